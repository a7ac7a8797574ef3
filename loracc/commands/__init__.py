"""One file a command. Only click is imported at module level, so that ``loracc --help`` answers at once."""
