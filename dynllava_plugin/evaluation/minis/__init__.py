"""Miniatures of every benchmark in its real schema, made of easy-VQA's images: `dynllava make-mini DIR`."""
