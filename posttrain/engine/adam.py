"""What Adam keeps for every parameter, said once: its states' names and their size."""

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch and DeepSpeed name them
CLOCK = "step"  # how many steps the optimizer has made
FLOAT32 = 4  # bytes of an element; weights and moments are kept in float32, whatever dtype computes
STATE_BYTES = FLOAT32 * (1 + len(MOMENTS))  # of a parameter: its float32 master weight and its moments
