"""An option for clients of httpx that send requests to http://, so that they start faster."""

import ssl

# By default, each client reads the certificates of all authorities, which takes 45 ms of processor time. With
# `verify=NO_AUTHORITIES` it reads none, and would refuse every server at https://.
NO_AUTHORITIES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
