"""Codecs: request bodies to fields and float32 rows, and fields to response bodies.

request_body.py picks the reader of a body by its Content-Type, response_body.py the format of a response by its Accept
header; a new media type is registered in `read_fields` and in the tuples of response_body.py (row-per-line formats for
/anomaly in `RECORD_READERS` of anomaly/inputs.py). One file per format: npy, safetensors, png, ndjson, csv_rows,
telegraf, remote_write, simdjson_rows. row_schema.py describes a row; row_lists, row_records and row_arrays parse rows.
"""
