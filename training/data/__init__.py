"""From a source (file, folder, bundled data) to a table of rows."""
