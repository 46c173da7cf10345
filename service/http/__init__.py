"""HTTP without any particular endpoint: protocol, middleware, admission control, request context."""
