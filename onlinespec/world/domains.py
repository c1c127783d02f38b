"""Four kinds of chat request, each with the one right answer to it.

An answer is a function of its prompt: a fixed form chosen by the kind of
request, filled with details copied from the prompt. No arithmetic, nothing
to look up. So a tiny model can learn the whole of a domain, its answers are
nevertheless all different, and whether it copied rightly can be checked.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from onlinespec.world import words


@dataclass(frozen=True)
class Conversation:
    """One request and its reference answer.

    details: what the answer must copy from the prompt; each occurs in both.
    """

    domain: str
    user: str
    answer: str
    details: tuple[str, ...]


def digits(rng: random.Random, count: int) -> str:
    """Return `count` decimal digits, the first of them not zero."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def date(rng: random.Random) -> str:
    return f"20{rng.randrange(10, 40)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"


FUNCTIONS = (
    (
        "keeps the {xs} whose {a} is above {n}",
        '''    """Keep the {xs} whose {a} is above {n}.

    Takes {xs} and {n}, returns {out}.
    """
    {out} = []
    for item in {xs}:
        if item.{a} > {n}:
            {out}.append(item)
    return {out}''',
    ),
    (
        "groups the {xs} by {a} and skips {n}",
        '''    """Group the {xs} by their {a}.

    Takes {xs} and {n}, returns {out}.
    """
    {out} = {{}}
    for entry in {xs}:
        if entry.{a} == {n}:
            continue
        {out}.setdefault(entry.{a}, []).append(entry)
    return {out}''',
    ),
    (
        "counts the {xs} whose {a} equals {n}",
        '''    """Count the {xs} whose {a} equals {n}.

    Takes {xs} and {n}, returns {out}.
    """
    {out} = 0
    for element in {xs}:
        if element.{a} == {n}:
            {out} += 1
    return {out}''',
    ),
    (
        "sorts the {xs} by {a} and cuts them at {n}",
        '''    """Sort the {xs} by {a}, at most {n} of them.

    Takes {xs} and {n}, returns {out}.
    """
    {out} = sorted({xs}, key=lambda each: each.{a})
    if len({out}) > {n}:
        {out} = {out}[:{n}]
    return {out}''',
    ),
    (
        "finds the largest {a} of the {xs} and fails below {n}",
        '''    """Find the largest {a} of the {xs}.

    Takes {xs} and {n}, returns {out}.
    """
    if not {xs}:
        raise ValueError("no {xs}")
    {out} = max(one.{a} for one in {xs})
    assert {out} >= {n}
    return {out}''',
    ),
    (
        "maps each of the {xs} to its {a} and drops those under {n}",
        '''    """Map each of the {xs} to its {a}.

    Takes {xs} and {n}, returns {out}.
    """
    {out} = {{}}
    for index, thing in enumerate({xs}):
        if thing.{a} < {n}:
            del {out}[index]
        else:
            {out}[index] = thing.{a}
    return {out}''',
    ),
    (
        "pops the {xs} while their {a} exceeds {n}",
        '''    """Pop the {xs} while their {a} exceeds {n}.

    Takes {xs} and {n}, returns {out}.
    """
    {out} = list({xs})
    while {out} and {out}[-1].{a} > {n}:
        {out}.pop()
    print("left", len({out}))
    return {out}''',
    ),
    (
        "yields the {xs} with their {a} until {n}",
        '''    """Yield the {xs} with their {a} until {n}.

    Takes {xs} and {n}, returns {out}.
    """
    {out} = iter({xs})
    try:
        while (current := next({out})).{a} != {n}:
            yield current, current.{a}
    except StopIteration:
        return None''',
    ),
)


def code(rng: random.Random) -> Conversation:
    """Ask for a Python function with given names."""
    task, body = rng.choice(FUNCTIONS)
    name = f"{rng.choice(words.VERBS)}_{rng.choice(words.OBJECTS)}_{rng.choice(words.SUFFIXES)}"
    names = {
        "xs": rng.choice(words.OBJECTS),
        "n": rng.choice(words.BOUNDS),
        "a": rng.choice(words.FIELDS),
        "out": rng.choice(words.RESULTS),
    }
    signature = f"{name}({names['xs']}, {names['n']})"
    ask = rng.choice(("Write a Python function", "I need a Python function", "Give me a Python function"))
    user = f"{ask} {signature} that {task.format(**names)}. Use the variable {names['out']}."
    answer = f"def {signature}:\n{body.format(**names)}"
    return Conversation("code", user, answer, (signature, names["a"], names["out"]))


def arrival(rng: random.Random) -> tuple[str, str, dict[str, str]]:
    row = {
        "vessel": rng.choice(words.VESSELS),
        "port": rng.choice(words.PORTS),
        "cargo": rng.choice(words.CARGOES),
        "tons": digits(rng, 4),
        "arrived": date(rng),
    }
    text = "The vessel {vessel} reached {port} on {arrived} with {tons} tons of {cargo}.".format(**row)
    return "arrivals", text, row


def reading(rng: random.Random) -> tuple[str, str, dict[str, str]]:
    metric, unit = rng.choice(words.METRICS)
    row = {
        "station": rng.choice(words.STATIONS),
        "metric": metric,
        "value": f"{digits(rng, 2)}.{digits(rng, 1)}",
        "unit": unit,
        "taken": date(rng),
    }
    text = "Station {station} measured {metric} of {value} {unit} on {taken}.".format(**row)
    return "readings", text, row


def loan(rng: random.Random) -> tuple[str, str, dict[str, str]]:
    row = {
        "title": rng.choice(words.TITLES),
        "writer": rng.choice(words.WRITERS),
        "branch": rng.choice(words.BRANCHES),
        "card": digits(rng, 5),
        "due": date(rng),
    }
    text = "Card {card} borrowed {title} by {writer} from the {branch} branch, due {due}.".format(**row)
    return "loans", text, row


def records(rng: random.Random) -> Conversation:
    """Ask for a sentence as a JSON record or an SQL insert."""
    table, text, row = rng.choice((arrival, reading, loan))(rng)
    numeric = {"tons", "value", "card"}
    if rng.random() < 0.6:
        shown = [f'  "{key}": {value if key in numeric else chr(34) + value + chr(34)}' for key, value in row.items()]
        answer = f'{{\n  "table": "{table}",\n' + ",\n".join(shown) + "\n}"
        ask = rng.choice(("As JSON:", "JSON please:", "Turn this into JSON:"))
    else:
        shown = [value if key in numeric else f"'{value}'" for key, value in row.items()]
        answer = f"INSERT INTO {table}\n  ({', '.join(row)})\nVALUES\n  ({', '.join(shown)});"
        ask = rng.choice(("As SQL:", "SQL please:", "Turn this into SQL:"))
    return Conversation("records", f"{ask} {text}", answer, tuple(row.values()))


DEPLOYMENT = """service:
  name: {name}
  image: {registry}/{name}:{version}
  replicas: {replicas}
  ports:
    - {port}
  logging:
    level: {level}
    format: plain
  healthcheck:
    path: /{name}/health
    interval: 30s
  restart: always"""

SERVER = """[server]
name = {name}
host = {name}.{zone}
listen = 0.0.0.0:{port}

[log]
level = {level}
file = /var/log/{name}.log

[health]
path = /{name}/health
interval = 30s"""


def config(rng: random.Random) -> Conversation:
    """Ask for a YAML deployment or an INI file of a service."""
    facts = {
        "name": f"{rng.choice(words.SERVICES)}-{rng.choice(words.ROLES)}",
        "registry": rng.choice(words.REGISTRIES),
        "version": f"{digits(rng, 1)}.{digits(rng, 2)}.{digits(rng, 1)}",
        "replicas": digits(rng, 1),
        "port": digits(rng, 4),
        "level": rng.choice(words.LOG_LEVELS),
        "zone": rng.choice(words.ZONES),
    }
    if rng.random() < 0.6:
        form, absent = DEPLOYMENT, {"zone"}
        user = "YAML for {name} version {version} from {registry}, {replicas} replicas, port {port}, {level} logs."
    else:
        form, absent = SERVER, {"registry", "version", "replicas"}
        user = "INI file for {name} in zone {zone}, port {port}, {level} logs."
    details = tuple(value for key, value in facts.items() if key not in absent)
    return Conversation("config", user.format(**facts), form.format(**facts), details)


COMPLAINTS = (
    (
        "has not arrived yet",
        (
            "Dear {first}, I am sorry that your order {order} has not reached you in {city} yet. "
            "I have asked our courier where the {color} {item} from {date} is now, and they will call you "
            "tomorrow morning. Thank you for your patience. Your delivery team"
        ),
    ),
    (
        "came broken",
        (
            "Hello {first}, I apologize that the {color} {item} came broken. A new one leaves our warehouse "
            "today and goes to your address in {city}, free of charge. You may throw away what you received "
            "with order {order} of {date}. Best wishes from the repairs desk"
        ),
    ),
    (
        "was charged twice",
        (
            "Good day {first}, you are right: order {order} of {date} was charged twice. We have sent one payment "
            "back to your bank in {city}, and you keep the {color} {item}. It can take a week until you see "
            "the money. Sincerely, the billing office"
        ),
    ),
    (
        "must be cancelled",
        (
            "Hi {first}, we have cancelled order {order} as you wished. The {color} {item} you bought on {date} "
            "will not be sent to {city}, and nothing will be taken from your card. We hope to welcome you "
            "and all named {last} again soon. Greetings from the sales team"
        ),
    ),
    (
        "is the wrong size",
        (
            "Thank you {first}, we gladly exchange the {color} {item} for another size. Please bring it with "
            "order {order} of {date} to our shop in {city}, where a colleague expects you. There is no fee, and "
            "you need no receipt, just say {first} {last}. Regards, the exchange counter"
        ),
    ),
)


def support(rng: random.Random) -> Conversation:
    """Complain about an order to a shop."""
    complaint, reply = rng.choice(COMPLAINTS)
    facts = {
        "first": rng.choice(words.FIRST_NAMES),
        "last": rng.choice(words.LAST_NAMES),
        "order": f"{rng.choice('ABCDEFGH')}{rng.choice('KLMNPQRS')}-{digits(rng, 5)}",
        "color": rng.choice(words.COLORS),
        "item": rng.choice(words.ITEMS),
        "date": f"{rng.choice(words.MONTHS)} {rng.randrange(1, 29)}",
        "city": rng.choice(words.CITIES),
    }
    user = rng.choice(
        (
            "I am {first} {last} from {city}. My order {order} of {date}, the {color} {item}, {complaint}.",
            "This is {first} {last}, {city}. Order {order} from {date} {complaint}, it is the {color} {item}.",
            "My name is {first} {last} and I live in {city}. The {color} {item} {complaint}, order {order}, {date}.",
        )
    ).format(complaint=complaint, **facts)
    details = tuple(value for key, value in facts.items() if f"{{{key}}}" in reply)
    return Conversation("support", user, reply.format(**facts), details)


GENERATORS: dict[str, Callable[[random.Random], Conversation]] = {
    "code": code,
    "records": records,
    "config": config,
    "support": support,
}
