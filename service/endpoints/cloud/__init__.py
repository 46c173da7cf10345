"""The endpoints that Amazon SageMaker and Google Vertex AI call."""
