"""The `effplugin` command."""
