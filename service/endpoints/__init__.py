"""The endpoints: the table of routes, the handlers and the OpenAPI document."""
