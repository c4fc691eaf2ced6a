"""The moments of one segment: their names, their order, and what each is for.

Every kernel writes them in this order, one row a moment: an array [N_MOMENTS, n_segments], float64. With p the
parameters before the step, p' after it as stored, g the gradient of the loss alone, u the update, v' the new buffer:

    charges      sum_p = ⟨p', 1⟩     sq_p = |p'|²
    constraints  sum_g = ⟨g, 1⟩      dot_pg = ⟨p, g⟩
    integrands   sq_g = |g|²         sq_u = |u|²        dot_uv = ⟨u, v'⟩        dot_gu = ⟨g, u⟩
"""

from enum import IntEnum


class Moment(IntEnum):
    """Row of each moment in the array [N_MOMENTS, n_segments]."""

    SUM_P = 0
    SQ_P = 1
    SUM_G = 2
    SQ_G = 3
    DOT_PG = 4
    SQ_U = 5
    DOT_UV = 6  # Nesterov, and a buffer that a step without momentum leaves as it is; zero elsewhere
    DOT_GU = 7  # Nesterov only, zero elsewhere


N_MOMENTS = len(Moment)

#: The moments that a readout shows, by name.
READOUT_MOMENTS = {moment.name.lower(): moment for moment in list(Moment)[:6]}
