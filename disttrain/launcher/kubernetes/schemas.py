"""What the kinds look like: every field and its type, as far as training jobs use them.

"string", "integer", "boolean"      that type
"quantity", "port"                  a number or a string, such as 500m; a number or a name
("a", "b")                          one of these strings
[x]                                 a list of x
{"*": x}                            any keys, each with an x
{"field": x, "other!": y}           these fields and no others; those with an exclamation mark must be there
"any"                               not looked into
"""

from __future__ import annotations

from typing import Any

Schema = str | tuple | list | dict

_STRINGS = {"*": "string"}
_SELECTOR = {
    "matchLabels": _STRINGS,
    "matchExpressions": [{"key!": "string", "operator!": "string", "values": ["string"]}],
}
_METADATA = {
    "name": "string",
    "generateName": "string",
    "namespace": "string",
    "labels": _STRINGS,
    "annotations": _STRINGS,
    "finalizers": ["string"],
    "ownerReferences": "any",
}
_RESOURCES = {
    "limits": {"*": "quantity"},
    "requests": {"*": "quantity"},
    "claims": [{"name!": "string", "request": "string"}],
}
_KEY = {"key!": "string", "name": "string", "optional": "boolean"}
_ENV = {
    "name!": "string",
    "value": "string",
    "valueFrom": {
        "configMapKeyRef": _KEY,
        "secretKeyRef": _KEY,
        "fieldRef": {"apiVersion": "string", "fieldPath!": "string"},
        "resourceFieldRef": {"containerName": "string", "divisor": "quantity", "resource!": "string"},
        "fileKeyRef": {"key!": "string", "optional": "boolean", "path!": "string", "volumeName!": "string"},
    },
}
_HANDLER = {
    "exec": {"command": ["string"]},
    "tcpSocket": {"host": "string", "port!": "port"},
    "httpGet": {
        "host": "string",
        "path": "string",
        "port!": "port",
        "scheme": "string",
        "httpHeaders": [{"name!": "string", "value!": "string"}],
    },
}
_PROBE = {
    **_HANDLER,
    "grpc": {"port!": "integer", "service": "string"},
    **dict.fromkeys(["failureThreshold", "initialDelaySeconds", "periodSeconds", "successThreshold"], "integer"),
    **dict.fromkeys(["timeoutSeconds", "terminationGracePeriodSeconds"], "integer"),
}
_SECURITY = {
    **dict.fromkeys(["runAsUser", "runAsGroup"], "integer"),
    "runAsNonRoot": "boolean",
    "seccompProfile": {"type!": ("RuntimeDefault", "Localhost", "Unconfined"), "localhostProfile": "string"},
    "appArmorProfile": {"type!": ("RuntimeDefault", "Localhost", "Unconfined"), "localhostProfile": "string"},
    "seLinuxOptions": dict.fromkeys(["level", "role", "type", "user"], "string"),
    "windowsOptions": "any",
}
_HOOK = {**_HANDLER, "sleep": {"seconds!": "integer"}}
_CONTAINER = {
    "name!": "string",
    "image": "string",
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "command": ["string"],
    "args": ["string"],
    "workingDir": "string",
    "env": [_ENV],
    "envFrom": [
        {
            "prefix": "string",
            "configMapRef": {"name": "string", "optional": "boolean"},
            "secretRef": {"name": "string", "optional": "boolean"},
        }
    ],
    "ports": [
        {
            "containerPort!": "integer",
            "hostPort": "integer",
            "hostIP": "string",
            "name": "string",
            "protocol": ("TCP", "UDP", "SCTP"),
        }
    ],
    "resources": _RESOURCES,
    "resizePolicy": [{"resourceName!": "string", "restartPolicy!": "string"}],
    "volumeMounts": [
        {
            "name!": "string",
            "mountPath!": "string",
            "subPath": "string",
            "subPathExpr": "string",
            "readOnly": "boolean",
            "mountPropagation": "string",
            "recursiveReadOnly": "string",
        }
    ],
    "volumeDevices": [{"name!": "string", "devicePath!": "string"}],
    "livenessProbe": _PROBE,
    "readinessProbe": _PROBE,
    "startupProbe": _PROBE,
    "lifecycle": {"postStart": _HOOK, "preStop": _HOOK, "stopSignal": "string"},
    "securityContext": {
        **_SECURITY,
        **dict.fromkeys(["allowPrivilegeEscalation", "privileged", "readOnlyRootFilesystem"], "boolean"),
        "capabilities": {"add": ["string"], "drop": ["string"]},
        "procMount": "string",
    },
    "restartPolicy": "string",
    "restartPolicyRules": "any",
    "stdin": "boolean",
    "stdinOnce": "boolean",
    "tty": "boolean",
    "terminationMessagePath": "string",
    "terminationMessagePolicy": ("File", "FallbackToLogsOnError"),
}
_ITEMS = [{"key!": "string", "path!": "string", "mode": "integer"}]
_CONFIG_MAP = {"name": "string", "optional": "boolean", "defaultMode": "integer", "items": _ITEMS}
_SECRET = {"secretName": "string", "optional": "boolean", "defaultMode": "integer", "items": _ITEMS}
_CLAIM = {
    "accessModes": [("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")],
    "resources": {"limits": {"*": "quantity"}, "requests": {"*": "quantity"}},
    "selector": _SELECTOR,
    "storageClassName": "string",
    "volumeAttributesClassName": "string",
    "volumeMode": ("Filesystem", "Block"),
    "volumeName": "string",
    "dataSource": "any",
    "dataSourceRef": "any",
}
_VOLUME = {
    "name!": "string",
    "persistentVolumeClaim": {"claimName!": "string", "readOnly": "boolean"},
    "emptyDir": {"medium": "string", "sizeLimit": "quantity"},
    "configMap": _CONFIG_MAP,
    "secret": _SECRET,
    "hostPath": {"path!": "string", "type": "string"},
    "nfs": {"server!": "string", "path!": "string", "readOnly": "boolean"},
    "ephemeral": {"volumeClaimTemplate": {"metadata": _METADATA, "spec!": _CLAIM}},
    **dict.fromkeys(["csi", "downwardAPI", "projected", "image", "iscsi", "fc", "cephfs", "glusterfs", "rbd"], "any"),
    **dict.fromkeys(["awsElasticBlockStore", "azureDisk", "azureFile", "cinder", "flexVolume", "flocker"], "any"),
    **dict.fromkeys(["gcePersistentDisk", "photonPersistentDisk", "portworxVolume", "quobyte", "scaleIO"], "any"),
    **dict.fromkeys(["gitRepo", "storageos", "vsphereVolume"], "any"),
}
_POD = {
    "containers!": [_CONTAINER],
    "initContainers": [_CONTAINER],
    "volumes": [_VOLUME],
    "restartPolicy": ("Always", "OnFailure", "Never"),
    "securityContext": {
        **_SECURITY,
        "fsGroup": "integer",
        "fsGroupChangePolicy": ("OnRootMismatch", "Always"),
        "supplementalGroups": ["integer"],
        "supplementalGroupsPolicy": "string",
        "seLinuxChangePolicy": "string",
        "sysctls": [{"name!": "string", "value!": "string"}],
    },
    **dict.fromkeys(["activeDeadlineSeconds", "priority", "terminationGracePeriodSeconds"], "integer"),
    **dict.fromkeys(["automountServiceAccountToken", "enableServiceLinks", "hostIPC", "hostNetwork"], "boolean"),
    **dict.fromkeys(["hostPID", "hostUsers", "setHostnameAsFQDN", "shareProcessNamespace"], "boolean"),
    **dict.fromkeys(["dnsPolicy", "hostname", "hostnameOverride", "nodeName", "preemptionPolicy"], "string"),
    **dict.fromkeys(["priorityClassName", "runtimeClassName", "schedulerName", "serviceAccount"], "string"),
    **dict.fromkeys(["serviceAccountName", "subdomain"], "string"),
    "nodeSelector": _STRINGS,
    "tolerations": [
        {
            **dict.fromkeys(["key", "operator", "value", "effect"], "string"),
            "tolerationSeconds": "integer",
        }
    ],
    "topologySpreadConstraints": [
        {
            "maxSkew!": "integer",
            "topologyKey!": "string",
            "whenUnsatisfiable!": ("DoNotSchedule", "ScheduleAnyway"),
            "labelSelector": _SELECTOR,
            "matchLabelKeys": ["string"],
            "minDomains": "integer",
            "nodeAffinityPolicy": "string",
            "nodeTaintsPolicy": "string",
        }
    ],
    "affinity": {"nodeAffinity": "any", "podAffinity": "any", "podAntiAffinity": "any"},
    "imagePullSecrets": [{"name": "string"}],
    "hostAliases": [{"ip!": "string", "hostnames": ["string"]}],
    "dnsConfig": {
        "nameservers": ["string"],
        "searches": ["string"],
        "options": [{"name": "string", "value": "string"}],
    },
    "readinessGates": [{"conditionType!": "string"}],
    "resourceClaims": "any",
    "schedulingGates": [{"name!": "string"}],
    "schedulingGroup": "any",
    "workloadRef": "any",
    "ephemeralContainers": "any",
    "os": {"name!": "string"},
    "overhead": {"*": "quantity"},
    "resources": _RESOURCES,
}
_POD_TEMPLATE = {"metadata": _METADATA, "spec!": _POD}
_JOB = {
    **dict.fromkeys(["activeDeadlineSeconds", "backoffLimit", "backoffLimitPerIndex", "completions"], "integer"),
    **dict.fromkeys(["maxFailedIndexes", "parallelism", "ttlSecondsAfterFinished"], "integer"),
    "completionMode": ("NonIndexed", "Indexed"),
    "managedBy": "string",
    "manualSelector": "boolean",
    "selector": _SELECTOR,
    "suspend": "boolean",
    "podReplacementPolicy": ("TerminatingOrFailed", "Failed"),
    "podFailurePolicy": {
        "rules!": [
            {
                "action!": ("FailJob", "FailIndex", "Ignore", "Count"),
                "onExitCodes": {"containerName": "string", "operator!": ("In", "NotIn"), "values!": ["integer"]},
                "onPodConditions": [{"type!": "string", "status": "string"}],
            }
        ]
    },
    "successPolicy": {"rules!": [{"succeededCount": "integer", "succeededIndexes": "string"}]},
    "template!": _POD_TEMPLATE,
}
_JOBSET = {
    "coordinator": {"jobIndex": "integer", "podIndex": "integer", "replicatedJob!": "string"},
    "failurePolicy": {
        "maxRestarts": "integer",
        "restartStrategy": ("Recreate", "BlockingRecreate", "InPlaceRestart"),
        "rules": [
            {
                "name!": "string",
                "action!": (
                    "FailJobSet",
                    "RestartJobSet",
                    "RestartJobSetAndIgnoreMaxRestarts",
                    "RestartJob",
                    "RestartJobAndIgnoreMaxRestarts",
                ),
                "onJobFailureMessagePatterns": ["string"],
                "onJobFailureReasons": ["string"],
                "targetReplicatedJobs": ["string"],
            }
        ],
    },
    "managedBy": "string",
    "network": {"enableDNSHostnames": "boolean", "publishNotReadyAddresses": "boolean", "subdomain": "string"},
    "replicatedJobs": [
        {
            "name!": "string",
            "groupName": "string",
            "replicas": "integer",
            "dependsOn": [{"name!": "string", "status!": ("Ready", "Complete")}],
            "template!": {"metadata": _METADATA, "spec!": _JOB},
        }
    ],
    "startupPolicy": {"startupPolicyOrder!": ("AnyOrder", "InOrder")},
    "successPolicy": {"operator!": ("All", "Any"), "targetReplicatedJobs": ["string"]},
    "suspend": "boolean",
    "ttlSecondsAfterFinished": "integer",
    "volumeClaimPolicies": "any",
}
_MPIJOB = {
    "launcherCreationPolicy": ("AtStartup", "WaitForWorkersReady"),
    "mpiImplementation": ("OpenMPI", "Intel", "MPICH"),
    "mpiReplicaSpecs!": {"*": {"replicas": "integer", "restartPolicy": "string", "template": _POD_TEMPLATE}},
    "runLauncherAsWorker": "boolean",
    "runPolicy": {
        **dict.fromkeys(["activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"], "integer"),
        **dict.fromkeys(["cleanPodPolicy", "managedBy"], "string"),
        "schedulingPolicy": {
            **dict.fromkeys(["minAvailable", "scheduleTimeoutSeconds"], "integer"),
            **dict.fromkeys(["priorityClass", "queue"], "string"),
            "minResources": {"*": "quantity"},
        },
        "suspend": "boolean",
    },
    "slotsPerWorker": "integer",
    "sshAuthMountPath": "string",
}
_RUNTIME = {
    "mlPolicy": {
        "numNodes": "integer",
        "mpi": {
            "mpiImplementation": ("OpenMPI", ""),
            "numProcPerNode": "integer",
            "runLauncherAsNode": "boolean",
            "sshAuthMountPath": "string",
        },
        **dict.fromkeys(["flux", "jax", "torch", "xgboost"], "any"),
    },
    "podGroupPolicy": {
        "coscheduling": {"scheduleTimeoutSeconds": "integer"},
        "volcano": {"networkTopology": {"highestTierAllowed": "integer", "mode": ("hard", "soft")}},
    },
    "template!": {"metadata": _METADATA, "spec!": _JOBSET},
}
_TRAINJOB = {
    "activeDeadlineSeconds": "integer",
    "initializer": "any",
    "managedBy": "string",
    "runtimePatches": "any",
    "runtimeRef!": {"apiGroup": "string", "kind": "string", "name!": "string"},
    "suspend": "boolean",
    "trainer": {
        "args": ["string"],
        "command": ["string"],
        "env": [_ENV],
        "image": "string",
        "numNodes": "integer",
        "numProcPerNode": "integer",
        "resourcesPerNode": _RESOURCES,
    },
}
_SERVICE = {
    **dict.fromkeys(["clusterIP", "type", "sessionAffinity", "ipFamilyPolicy", "externalName"], "string"),
    **dict.fromkeys(["internalTrafficPolicy", "externalTrafficPolicy", "trafficDistribution"], "string"),
    **dict.fromkeys(["loadBalancerClass", "loadBalancerIP"], "string"),
    **{name: ["string"] for name in ("clusterIPs", "ipFamilies", "externalIPs", "loadBalancerSourceRanges")},
    **dict.fromkeys(["publishNotReadyAddresses", "allocateLoadBalancerNodePorts"], "boolean"),
    "healthCheckNodePort": "integer",
    "selector": _STRINGS,
    "sessionAffinityConfig": "any",
    "ports": [
        {
            "name": "string",
            "port!": "integer",
            "targetPort": "port",
            "nodePort": "integer",
            "protocol": ("TCP", "UDP", "SCTP"),
            "appProtocol": "string",
        }
    ],
}


def _kind(spec: Schema) -> dict[str, Any]:
    return {"apiVersion!": "string", "kind!": "string", "metadata!": _METADATA, "spec!": spec}


KINDS: dict[tuple[str, str], Schema] = {
    ("kubeflow.org/v2beta1", "MPIJob"): _kind(_MPIJOB),
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): _kind(_TRAINJOB),
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): _kind(_RUNTIME),
    ("trainer.kubeflow.org/v1alpha1", "ClusterTrainingRuntime"): _kind(_RUNTIME),
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): _kind(_JOBSET),
    ("batch/v1", "Job"): _kind(_JOB),
    ("v1", "Service"): _kind(_SERVICE),
    ("v1", "PersistentVolumeClaim"): _kind(_CLAIM),
    ("v1", "ConfigMap"): {
        "apiVersion!": "string",
        "kind!": "string",
        "metadata!": _METADATA,
        "data": _STRINGS,
        "binaryData": _STRINGS,
        "immutable": "boolean",
    },
}
