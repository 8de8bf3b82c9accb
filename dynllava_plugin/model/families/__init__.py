"""The supported families, one short file each, which says only what differs."""
