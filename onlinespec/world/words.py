"""The word lists of the demo's four domains.

Each domain has its own nouns, so that a draft that knows one domain has no
head start in the next. Lists are short enough that every word occurs some
hundred times in the training corpus, and long enough that their products
make held-out answers distinct.
"""


def listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# code
VERBS = listed(
    "collect merge filter group count sort rank trim parse load split index "
    "update remove select encode decode flatten reverse match store fetch "
    "compare convert extract format inspect normalize"
)
OBJECTS = listed(
    "rows nodes edges tokens events pixels lines users files words keys "
    "values blocks frames samples scores labels paths bytes cells jobs tasks "
    "pages links chunks vectors tables queues"
)
SUFFIXES = listed("fast safe once twice early late local remote sorted unique")
BOUNDS = listed("limit cutoff floor ceiling bound threshold minimum maximum")
RESULTS = listed("result output kept found chosen buffer answer gathered")
FIELDS = listed("size name kind level weight color owner state depth width height score length speed priority angle")

# records
VESSELS = listed(
    "Aurora Borealis Calypso Dorado Endeavour Fortuna Galatea Halcyon Icarus "
    "Juno Kestrel Leviathan Meridian Nautilus Orion Pelican Quasar Rosalind "
    "Saturn Triton Undine Valiant Wanderer Zephyr"
)
PORTS = listed(
    "Antwerp Busan Callao Durban Gdansk Hamburg Izmir Karachi Lagos Mombasa "
    "Odessa Piraeus Rotterdam Santos Tampa Valencia Xiamen Yokohama"
)
CARGOES = listed("cocoa cement copper timber barley rubber sulfur cotton potash bauxite zinc tea")
STATIONS = listed("Alder Birch Cedar Elm Fir Hazel Juniper Larch Maple Oak Pine Rowan Spruce Willow Yew")
METRICS = (
    ("humidity", "percent"),
    ("pressure", "hPa"),
    ("rainfall", "mm"),
    ("wind", "knots"),
    ("ozone", "ppb"),
    ("radiation", "watts"),
)
TITLES = (
    "Silent Harbor",
    "Glass Orchard",
    "Iron Lantern",
    "Hollow Crown",
    "Distant Drum",
    "Velvet Raven",
    "Broken Compass",
    "Winter Garden",
    "Crimson Tide",
    "Paper Moon",
    "Salt Road",
    "Golden Cage",
)
WRITERS = listed("Abbott Bishop Carver Dalton Ellison Fletcher Granger Holloway Irving Jarvis Keller Lowell")
BRANCHES = listed("north south east west central riverside hillside harbor")

# config
SERVICES = listed(
    "billing search ledger gateway mailer catalog session metrics scheduler "
    "webhook invoice profile upload crawler render audit quota digest"
)
ROLES = listed("api worker proxy cron sync bridge agent relay")
LOG_LEVELS = listed("debug info warning error trace")
REGISTRIES = listed("quay.io ghcr.io docker.io registry.local harbor.lan")
REGIONS = listed("eu-west eu-north us-east us-south ap-east sa-west")
ZONES = listed("lan corp cloud internal test prod")

# support
FIRST_NAMES = listed(
    "Alice Brian Clara Dennis Emma Felix Grace Henry Irene Jack Karen Louis "
    "Martha Nathan Olivia Peter Quinn Rachel Simon Teresa Ursula Victor Wendy Zoe"
)
LAST_NAMES = listed(
    "Adams Baker Carter Davis Evans Foster Green Hughes Jones Kelly Lewis "
    "Morgan Nelson Owens Parker Reed Scott Turner Walker Young"
)
CITIES = listed(
    "Austin Boston Chicago Denver Eugene Fresno Georgia Houston Indiana "
    "Jackson Kansas Lincoln Memphis Nevada Oakland Phoenix Raleigh Seattle Tucson Wichita"
)
COLORS = listed("red blue green black white silver purple orange brown yellow")
ITEMS = listed(
    "kettle lamp backpack jacket blender toaster carpet mirror headphones "
    "keyboard umbrella suitcase blanket bicycle camera sofa"
)
MONTHS = listed("January February March April May June July August September October November December")
