"""A directory of its own for the plugin: ms-swift puts it first on the path and imports the file by its bare name."""
