"""The errors that users see. Each one names the setting at fault and the way out."""


class EffPluginError(ValueError):
    """Base of every error this package raises on purpose."""


class ConfigError(EffPluginError):
    """An `efficiency` block that cannot be served: an unknown key or an impossible value."""


class CheckpointError(EffPluginError):
    """A checkpoint directory that is incomplete, damaged, or would be overwritten."""


class UnsupportedError(EffPluginError):
    """A combination of settings that is refused at start."""
