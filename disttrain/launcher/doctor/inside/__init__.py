"""What the probes run in processes of their own, here and on other hosts. Sent as text: nothing of disttrain is imported."""
