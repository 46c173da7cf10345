"""The headers that tell a browser what it may do with a page, a script or a file of the server.

Every response has them, except the results of models, which a browser does not show as pages. The policy forbids
everything. The pages have policies of their own, which allow their scripts and styles.
"""

import base64
import hashlib
import re

POLICY = b"content-security-policy"
_NOTHING = b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)

HEADERS = (
    (b"x-content-type-options", b"nosniff"),  # a browser must not guess another media type
    (b"referrer-policy", b"no-referrer"),  # other sites learn nothing about the address of the server
    (b"x-frame-options", b"DENY"),  # for browsers that do not know frame-ancestors
)
_NO_PAGE = (POLICY, _NOTHING)


def complete(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return `headers` with the security headers. A policy in `headers` stays; without one, nothing may be loaded."""
    for name, _ in headers:
        if name == POLICY:
            return [*headers, *HEADERS]
    return [*headers, *HEADERS, _NO_PAGE]


def page_policy(html: bytes = b"") -> str:
    """Return the Content-Security-Policy of a page that loads scripts, styles and data from the server only.

    Args:
        html: the page. Its inline scripts are allowed by their SHA-256 hashes, and inline styles are allowed too.
            Without it, neither is allowed.
    """
    scripts, styles, images = ["'self'"], ["'self'"], ["'self'", "blob:"]
    if html:
        digests = [hashlib.sha256(script).digest() for script in _INLINE_SCRIPT.findall(html)]
        scripts += [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
        styles.append("'unsafe-inline'")
        images.append("data:")
    return (
        f"default-src 'none'; script-src {' '.join(scripts)}; style-src {' '.join(styles)}; "
        f"img-src {' '.join(images)}; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
