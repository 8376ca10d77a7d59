"""REALM as a service: export, model server, clients."""
