"""See the package."""


class FlashMLASchedMeta: ...
