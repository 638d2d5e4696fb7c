"""Moving tensors through the families' tables: between Megatron parameters and files, ranks, engines."""
