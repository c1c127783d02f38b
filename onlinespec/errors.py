"""The exception tree: what a user can have done wrong, and what can go wrong on a wire or a disk.

OnlinespecError
 +- ConfigError       a config file or an override: unknown key, wrong type, out of range
 +- StartError        the server cannot be started: port taken, SGLang of an unknown version, model missing
 |   +- UnsupportedError  an SGLang setting under which capture is not defined
 +- CheckpointError   a draft that does not fit its target, or is truncated
 +- WireError         a message or a tensor frame that does not decode
 +- SiteError         a hook site of SGLang that is missing or has changed
 +- SwapError         the server refused a swap
 |   +- NotYetError   some rank is still at what an order wants done; it is asked again
 +- VersionError      a version that is not in the store, or is damaged
 +- RecordError       a recording that is damaged, does not fit, or cannot be made
 +- TrainError        offline training that cannot begin or go on as asked
 +- DataError         a data set, or a line of it, that cannot be used
 +- BenchError        a benchmark that cannot be run as asked

Every message is one sentence or two: what was found, what was wanted, what to do next.
"""


class OnlinespecError(Exception):
    """Root of every error this package raises for its user."""


class ConfigError(OnlinespecError):
    """A config value is unknown, of the wrong type or out of range."""


class StartError(OnlinespecError):
    """The server cannot be started as asked."""


class UnsupportedError(StartError):
    """An SGLang setting that onlinespec refuses by name."""


class CheckpointError(OnlinespecError):
    """A draft checkpoint cannot be used with this target."""


class WireError(OnlinespecError):
    """Bytes that are not a message, or a frame that does not match its header."""


class SiteError(OnlinespecError):
    """A hook site is missing or its source has changed."""


class SwapError(OnlinespecError):
    """The server refused to change the draft's weights."""


class NotYetError(SwapError):
    """Some rank has not done yet what this order wants done."""


class VersionError(OnlinespecError):
    """A draft version that does not exist or is damaged."""


class RecordError(OnlinespecError):
    """A recording cannot be written or read as asked."""


class TrainError(OnlinespecError):
    """Offline training cannot begin or go on as asked."""


class DataError(OnlinespecError):
    """A data set cannot be turned into rows."""


class BenchError(OnlinespecError):
    """A benchmark cannot be run as asked."""
