"""Models: the families' configs and tables (pure), and their construction in Megatron-Core (`build`)."""
