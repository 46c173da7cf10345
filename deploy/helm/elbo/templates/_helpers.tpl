{{- define "elbo.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "elbo.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "elbo.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "elbo.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "elbo.selector" -}}
app.kubernetes.io/name: {{ include "elbo.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "elbo.labels" -}}
{{ include "elbo.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "elbo.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "elbo.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "elbo.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "elbo.keysSecret" -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- .Values.apiKeys.existingSecret -}}
{{- else if .Values.apiKeys.file -}}
{{- printf "%s-api-keys" (include "elbo.fullname" . | trunc 54) -}}
{{- end -}}
{{- end -}}

{{/* Fail early, with what to do, where the server would fail or would serve nothing. */}}
{{- define "elbo.check" -}}
{{- $sources := list -}}
{{- if .Values.artifacts.claim }}{{ $sources = append $sources "claim" }}{{ end -}}
{{- if .Values.artifacts.image.repository }}{{ $sources = append $sources "image" }}{{ end -}}
{{- if .Values.artifacts.url }}{{ $sources = append $sources "url" }}{{ end -}}
{{- if ne (len $sources) 1 -}}
{{- fail (printf "set exactly one of artifacts.claim, artifacts.image.repository and artifacts.url, got %s" (default "none" (join " and " $sources))) -}}
{{- end -}}
{{- if and .Values.apiKeys.existingSecret .Values.apiKeys.file -}}
{{- fail "set one of apiKeys.existingSecret and apiKeys.file, got both" -}}
{{- end -}}
{{- if not (or .Values.insecure (include "elbo.keysSecret" .)) -}}
{{- fail "the server has no API keys: set apiKeys.existingSecret or apiKeys.file, or, if everybody who can reach the Service may use the server, insecure=true" -}}
{{- end -}}
{{- with .Values.serviceMonitor -}}
{{- if and .enabled (include "elbo.keysSecret" $) (not (and .keySecret.name .keySecret.key)) -}}
{{- fail "serviceMonitor.enabled needs serviceMonitor.keySecret.name and serviceMonitor.keySecret.key, because the server has API keys: make a key with elbo key add prometheus --scope metrics, and put it into a Secret" -}}
{{- end -}}
{{- end -}}
{{- end -}}
