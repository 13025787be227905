"""Tools over HTTP: `serving` serves a toolbox to other machines and other trainers, `client` is a toolbox over such a server.

`wire` says what crosses. The server needs the packages of the extra `server`; the client needs none of them.
"""
