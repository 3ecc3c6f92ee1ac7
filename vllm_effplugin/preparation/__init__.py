"""What all `effplugin prepare` commands share: text, base models, unfinished work, precision."""
