"""What is raised where mmsegmentation is not installed."""

from vrwkv.classification.errors import UserError


class MissingExtra(UserError, ImportError):
    """The message names the extra to install."""
