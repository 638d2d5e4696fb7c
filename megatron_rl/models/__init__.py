"""From a Hugging Face config.json to a Megatron-Core model, and the table of where each tensor goes.

families          what differs between architectures; start here for a new model
tensor_map        where every element of a Megatron parameter lives in a Hugging Face checkpoint
build             builds this rank's chunk of a GPTModel
layers, attention the portable layers, for machines without Transformer Engine
choices           which layers, optimizer and kernels a run takes, from `capabilities`
scalar_head       the head of critics and reward models
sizes             numbers of parameters, for plans
rope_parameters   rotary parameters of a config.json
batch_invariance  kernels whose results do not depend on the rest of the batch
"""
