"""Codecs, one file per format. They decode request bodies to fields and float32 rows, and encode responses to bytes.

To add a request format, register its reader in `request_body.read_fields`, or in `RECORD_READERS` of
`service.anomaly.inputs` if the format has one record per line. To add a response format, add its media type to a tuple
in `response_body`, and extend `render_response` in `service.endpoints.pipeline`, which writes responses. `row_schema`
describes a row. `row_lists`, `row_records` and `row_arrays` parse rows.
"""
