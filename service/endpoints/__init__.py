"""What each path does: the table of routes, the handlers, the OpenAPI document."""
