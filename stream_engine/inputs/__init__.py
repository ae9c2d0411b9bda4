"""Foreign files and rows -> a Sample or a named reject -> shards.

    sources, hub        which files a source is made of
    readers             a file -> numbered rows (tables, json_files, tars, compression) -> samples
    rows                a row -> a sample (layouts, questions, picture_values, images)
    ingest, known       samples -> shards, once; validate: the same without writing

Knows no model and no result, and imports no torch. Open readers.py first, then rows.py.
"""
