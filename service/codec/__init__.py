"""Codecs: decode request bodies to fields and float32 rows, encode response fields to bytes. One file per format.

To add a request format, register its reader in `request_body.read_fields`, or in `RECORD_READERS` of
`service.anomaly.inputs` if the format has one record per line. To add a response format, add its media type to a tuple
in `response_body`, and add code that writes the format to `service.endpoints.pipeline`. `row_schema` describes a row.
`row_lists`, `row_records` and `row_arrays` parse rows.
"""
