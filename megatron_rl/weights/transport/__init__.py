"""How slices travel between ranks, by a rank plan.

    exchange.py       one rank's part in a sync: pack, send, receive, load; start here
    messages.py       format and checksums of a message; messages of changed elements alone
    folder.py         transport through files, in shared memory or on a file system
    sockets.py        transport over TCP: listeners, endpoints, authentication
    process_group.py  transport over torch.distributed, gloo or NCCL

Which transport a run takes is chosen in `sync/transports.py`.
"""
