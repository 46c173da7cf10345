"""Remote repositories of artifacts: their URLs, their index, the local cache of a server, and copies between them."""
