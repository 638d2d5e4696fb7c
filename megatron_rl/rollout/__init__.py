"""vLLM engines: in the training process, or as servers of their own.

engine.py            `RolloutEngine`: an engine inside the training ranks; start here
llm.py, routes.py    vLLM's engine object and its arguments; recording of the experts that routers choose
remote.py            `RemoteEngine`: the same methods, for an engine in a server
server.py            vLLM servers as child processes, also for reward models
server_guard.py      inside a server: the token check, and the end with its parent
hosting.py           servers that other tasks of a Slurm job host
address.py           how a server is reached
worker_extension.py  methods in a server's vLLM workers that receive weights
weight_loading.py    new weights into a running vLLM model
sampling.py          sampling parameters and seeds
isolation.py         imports and runs vLLM without side effects on the process
"""
