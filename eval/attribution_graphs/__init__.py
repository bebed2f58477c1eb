"""Attribution graphs of single prompts (``sparsary circuits --prompt``)."""
