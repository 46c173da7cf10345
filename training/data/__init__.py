"""Read sources (files, folders, bundled data) into tables, and draw minibatches from them."""
