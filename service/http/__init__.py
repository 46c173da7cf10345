"""An HTTP request as such: protocol, middleware, admission control, request context. Knows no endpoint."""
