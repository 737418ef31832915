"""What a quantity is: tensors in, tensors out. Nothing but torch, no state, no logging."""

from lightning_sym.functional.alignment import (
    AlignmentNull as AlignmentNull,
    Relations as Relations,
    alignment_null as alignment_null,
    crh_relations as crh_relations,
    expected_alignment as expected_alignment,
    matrix_alignment as matrix_alignment,
    second_moment as second_moment,
    side_alignments as side_alignments,
)
from lightning_sym.functional.composition import (
    Bump as Bump,
    Memorisation as Memorisation,
    explained as explained,
    factorisation as factorisation,
    find_bump as find_bump,
    linear_readout as linear_readout,
    memorisation as memorisation,
    metric_tensor as metric_tensor,
    outer_product_rank as outer_product_rank,
    relative_error as relative_error,
    superposition as superposition,
    volume_element as volume_element,
)
from lightning_sym.functional.cosine import cosine as cosine, relative_distance as relative_distance
from lightning_sym.functional.curvature import (
    TopEigenvalue as TopEigenvalue,
    TraceEstimate as TraceEstimate,
    hessian_product as hessian_product,
    hutchinson_trace as hutchinson_trace,
    lanczos_top as lanczos_top,
    stability_line as stability_line,
)
from lightning_sym.functional.eigen import (
    batched_eigh as batched_eigh,
    batched_eigvalsh as batched_eigvalsh,
)
from lightning_sym.functional.feature_learning import mechanism as mechanism
from lightning_sym.functional.hierarchy import (
    breaking_distance as breaking_distance,
    depth_roles as depth_roles,
    gram_alignment as gram_alignment,
    loss_phases as loss_phases,
    unit_clusters as unit_clusters,
)
from lightning_sym.functional.nearest_mean import (
    nearest_mean_disagreements as nearest_mean_disagreements,
)
from lightning_sym.functional.neural_collapse import (
    NeuralCollapse as NeuralCollapse,
    neural_collapse as neural_collapse,
    neural_collapse_from_sums as neural_collapse_from_sums,
)
from lightning_sym.functional.pah import (
    PAHExponent as PAHExponent,
    PAHPhase as PAHPhase,
    pah_exponent as pah_exponent,
    pah_exponents as pah_exponents,
    pah_phase as pah_phase,
)
from lightning_sym.functional.power_law import PowerLaw as PowerLaw, power_law as power_law
from lightning_sym.functional.rank import (
    effective_rank as effective_rank,
    effective_rank_from_eigenvalues as effective_rank_from_eigenvalues,
    numerical_rank as numerical_rank,
    numerical_rank_from_eigenvalues as numerical_rank_from_eigenvalues,
    participation_ratio as participation_ratio,
    participation_ratio_from_covariance as participation_ratio_from_covariance,
    stable_rank as stable_rank,
)
from lightning_sym.functional.split_halves import (
    split_alignment as split_alignment,
    split_expected_alignment as split_expected_alignment,
    split_participation_ratio as split_participation_ratio,
    split_side_alignments as split_side_alignments,
)
from lightning_sym.functional.tangent import (
    CountSketch as CountSketch,
    KernelMove as KernelMove,
    kernel_move as kernel_move,
    layer_alignment as layer_alignment,
    tangent_kernel as tangent_kernel,
)
from lightning_sym.functional.units import (
    dead_fraction as dead_fraction,
    distinct_units as distinct_units,
    dormant_fraction as dormant_fraction,
    dormant_fraction_from_scores as dormant_fraction_from_scores,
    dormant_scores as dormant_scores,
    unit_groups as unit_groups,
    zero_units as zero_units,
)
