"""Trained weights to rollout engines.

    weight_sync.py  `WeightSync`: sends one version to all engines and verifies it; start here
    remote_sync.py  the rounds of a sync to engines in processes of their own, repeated after a failure
    transports.py   the sending side of each transport, and the choice among them
    engines.py      builds this rank's engine from the configuration: in the rank, or a client of a server

What is sent to whom is planned in `weights/plan`, and travels by `weights/transport`.
"""
