"""Codecs: decode request bodies to fields and float32 rows, encode response fields to bytes. One file per format.

To add a request format, register its reader in `request_body.read_fields`; if it has one record per line, in
`RECORD_READERS` of `service.anomaly.inputs`. To add a response format, add it to a tuple in `response_body`, and write
it in `service.endpoints.pipeline`. `row_schema` describes a row; `row_lists`, `row_records`, `row_arrays` parse rows.
"""
