"""Names and sizes of what Adam keeps for every parameter."""

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch and DeepSpeed name them
CLOCK = "step"  # key of the number of steps that the optimizer has made
FLOAT32 = 4  # bytes of an element; weights and moments are kept in float32, whatever dtype computes
STATE_BYTES = FLOAT32 * (1 + len(MOMENTS))  # for each parameter: its float32 master weight and its moments
