{{/* The broker as a container, its configuration and its volumes: for the gateway, for the sidecar of
     this chart, and for charts that have this one as a dependency:
       initContainers: [include "embed-token-broker.container"]
       volumes: [include "embed-token-broker.volumes"] */}}

{{- define "embed-token-broker.name" -}}
{{- $name := .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- if contains "embed-token-broker" $name }}{{ $name }}{{ else }}{{ $name }}-embed-token-broker{{ end -}}
{{- end }}

{{- define "embed-token-broker.selector" -}}
app.kubernetes.io/name: embed-token-broker
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "embed-token-broker.labels" -}}
{{ include "embed-token-broker.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "embed-token-broker.store" -}}
{{- if eq .Values.role "gateway" -}}
{{- if .Values.store.url }}{{ .Values.store.url -}}
{{- else if .Values.valkey.enabled }}valkey://{{ include "embed-token-broker.name" . }}-valkey:6379
{{- else if gt (int .Values.replicas) 1 -}}
{{- fail "replicas: a gateway of several needs what they share; set store.url, valkey.enabled or replicas: 1" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Pods of a sidecar live beside one that ends: one more than the replicas, and the bursts of one more
     again fit into the vendor's 120 a minute with 5 for calls that were held up. */}}
{{- define "embed-token-broker.budget" -}}
{{- $alive := add (int .Values.replicas) 1 -}}
{{- $rate := min (div (int .Values.issuer.budget) $alive) (div (sub 113 $alive) $alive) -}}
{{- $burst := min 8 (div (sub 114 (mul $rate $alive)) (add $alive 1)) -}}
{{- if lt (int $rate) 1 -}}
{{- fail "replicas: so many sidecars have no call a minute each within issuer.budget; use role: gateway" -}}
{{- end -}}
rate = {{ $rate }}
burst = {{ max 1 $burst }}
{{- end }}

{{- define "embed-token-broker.config" -}}
{{- $secrets := "/run/secrets/embed-token-broker" -}}
{{- $gateway := eq .Values.role "gateway" -}}
{{- $store := include "embed-token-broker.store" . -}}
[server]
listen = "{{ ternary "[::]" "127.0.0.1" $gateway }}:8080"
{{- if $gateway }}
{{- if and .Values.networkPolicy.enabled (or (not .Values.store.url) (regexMatch "^(valkeys|rediss)" .Values.store.url)) }}
private_network = true  # the policies, and a mesh, keep others away from what pods say
{{- end }}
drain = "20s"
drain_lead = "6s"  # readiness is probed every 2 s, and endpoints take a moment to spread
{{- else }}
drain_lead = "0s"  # nobody balances here: the backend has ended
{{- end }}

[admin]
listen = "[::]:9464"  # probes and Prometheus come from other hosts
{{ if or $gateway (eq .Values.issuer.kind "local") }}
{{- range $name, $client := .Values.clients }}
[clients.{{ $name }}]
secret_file = "{{ $secrets }}/{{ $name }}"
agents = {{ $client.agents | toJson }}
{{ else }}
{{- fail "clients: name who may ask" }}
{{- end }}
{{- end }}
[issuer]
kind = "{{ .Values.issuer.kind }}"
{{ if eq .Values.issuer.kind "upstream" }}
[issuer.upstream]
api_secret_files = ["{{ $secrets }}/vendor"]

[issuer.budget]
{{ if $gateway }}rate = {{ int .Values.issuer.budget }}{{ else }}{{ include "embed-token-broker.budget" . }}{{ end }}
{{ else }}
[issuer.local.keys.main]
secret_file = "{{ $secrets }}/signing"
{{ end }}
[store]
{{ if $store -}}
url = {{ $store | toJson }}
{{- with .Values.store.username }}
username = {{ . | toJson }}
{{- end }}
password_file = "/run/secrets/embed-token-broker-store/password"
encryption_key_file = "{{ $secrets }}/store"  # tokens lie there sealed
replicas = {{ add (int .Values.replicas) 1 }}  # with the one that is added while they are replaced
{{- else -}}
url = "sqlite:///var/lib/embed-token-broker/state.db"  # survives a crash, not the pod
{{- end }}
{{- end }}

{{- define "embed-token-broker.locked-in" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "embed-token-broker.pod-security" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "embed-token-broker.container" -}}
name: embed-token-broker # what config/prometheus/kubernetes.yml and the PodMonitor look for
image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: [serve]
{{- if eq .Values.role "sidecar" }}
restartPolicy: Always # this is what makes it a sidecar
{{- end }}
{{- with .Values.env }}
env:
  {{- range $name, $value := . }}
  - {name: {{ $name }}, value: {{ $value | quote }}}
  {{- end }}
{{- end }}
ports:
  {{- if eq .Values.role "gateway" }}
  - {name: http, containerPort: 8080}
  {{- end }}
  - {name: admin, containerPort: 9464}
securityContext:
  {{- include "embed-token-broker.locked-in" . | nindent 2 }}
resources:
  {{- toYaml .Values.resources | nindent 2 }}
startupProbe:
  httpGet: {path: /livez, port: admin}
  periodSeconds: 1
  failureThreshold: 30
readinessProbe:
  httpGet: {path: /readyz, port: admin}
  periodSeconds: 2
  timeoutSeconds: 1
  failureThreshold: 1
livenessProbe:
  httpGet: {path: /livez, port: admin}
  periodSeconds: 10
  timeoutSeconds: 3
  failureThreshold: 3
volumeMounts:
  - {name: embed-token-broker-config, mountPath: /etc/embed-token-broker, readOnly: true}
  - {name: embed-token-broker-secrets, mountPath: /run/secrets/embed-token-broker, readOnly: true}
  {{- if include "embed-token-broker.store" . }}
  - {name: embed-token-broker-store, mountPath: /run/secrets/embed-token-broker-store, readOnly: true}
  {{- else }}
  - {name: embed-token-broker-state, mountPath: /var/lib/embed-token-broker}
  {{- end }}
{{- end }}

{{- define "embed-token-broker.volumes" -}}
- name: embed-token-broker-config
  configMap: {name: {{ include "embed-token-broker.name" . }}}
- name: embed-token-broker-secrets
  secret: {secretName: {{ .Values.secret }}, defaultMode: 0440} # changed ones are read again
{{- if include "embed-token-broker.store" . }}
- name: embed-token-broker-store
  secret: {secretName: {{ .Values.store.passwordSecret }}, defaultMode: 0440}
{{- else }}
- name: embed-token-broker-state # ends with the pod, not with the container
  emptyDir: {sizeLimit: 1Gi}
{{- end }}
{{- end }}
