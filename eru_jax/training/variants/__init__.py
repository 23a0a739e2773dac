"""What the config fields `dk_dm.variant` and `no_rl.variant` choose from; see docs/method.md."""
