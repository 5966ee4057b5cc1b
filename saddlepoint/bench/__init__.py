"""Speed beside a peer: both tools in one run, on the same model and prompt, taking turns."""
