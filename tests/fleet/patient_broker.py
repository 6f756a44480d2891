"""`broker` with seconds for a call to the store: `python patient_broker.py serve --config FILE`.

A call has 50 ms, and a replica goes on alone where other tests take the machine for longer.  What
two replicas share shows only while every call is answered in time.
"""

import runpy

from broker.valkey.client import guarded

guarded.OPERATION_TIMEOUT = 20.0

if __name__ == "__main__":
    runpy.run_module("broker", run_name="__main__")
