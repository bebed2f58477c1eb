"""Definitions of probing results: tiles of the page, and the meaning of every entry by the pattern of its name."""

import re

# Prefix of entries -> title of their section.
SECTIONS = {
    "factors_": "Factors",
    "infomec_": "InfoMEC",
    "supervised_": "Supervised features of indirect-object identification",
    "sparse_probing_": "Sparse probing",
    "bottleneck_": "Concept bottleneck",
    "scr_": "Spurious correlation removal",
    "tpp_": "Targeted probe perturbation",
    "absorption_": "Absorption",
    "": "Dictionary and data",
}
# Entry, label, and the note below the number; braces name other entries.
TILES = (
    ("factors_latent_f1", "best latent F1", "mean over {factors_count} factors; a linear probe has {factors_probe_f1}"),
    ("factors_latent_found_08", "factors found", "fraction with a latent of F1 0.8 or more"),
    ("factors_absorption_fraction", "absorption", "mean over {factors_absorption_count} factors"),
    ("infomec_modularity", "modularity", "mean over {infomec_latents} latents that tell anything of {infomec_sources} factors"),
    ("infomec_matched_compactness", "compactness", "over the latents that match a value; over all {infomec_compactness}"),
    ("infomec_explicitness", "explicitness", "of the activation itself {infomec_activation_explicitness}"),
    ("supervised_all_latents_sufficiency", "sufficiency", "of reconstructions, indirect-object task"),
    ("supervised_all_latents_necessity", "necessity", "of reconstructions, indirect-object task"),
    (
        "sparse_probing_sae_top_1_test_accuracy",
        "sparse probing, k = 1",
        "one dimension has {sparse_probing_llm_top_1_test_accuracy}",
    ),
    ("sparse_probing_sae_test_accuracy", "probe on all latents", "on the activation {sparse_probing_llm_test_accuracy}"),
    (
        "bottleneck_accuracy",
        "bottleneck",
        "with {bottleneck_concepts} concepts a class; dense probe {bottleneck_dense_accuracy}",
    ),
    ("bottleneck_zeroed_own", "recall lost, one zeroed", "by the other classes {bottleneck_zeroed_others}; below 0: gained"),
    ("scr_metric_threshold_10", "SCR, 10 latents", "part of the gap that is closed"),
    ("tpp_threshold_10_total_metric", "TPP, 10 latents", "intended less unintended drop"),
    ("absorption_mean_absorption_fraction_score", "absorption score", "mean over labels, as in SAEBench"),
)
# Patterns of names, the first that matches counts.
PATTERNS = (
    (r"factors_(?:\w+_)?count", "Number of factors of this kind."),
    (r"factors_chance_f1", "F1 of a detector that always says yes, mean over factors."),
    (r"factors_gap_f1", "F1 of the linear probe minus that of the best latent, mean over factors."),
    (r"factors_latent_firing_f1", "F1 of the best latent that detects by firing alone (activation above 0)."),
    (
        r"factors_(?:\w+_)?latent_f1",
        "F1 of the latent that detects a factor best, mean over factors. Latent, sign and threshold are "
        "chosen on half of the documents and scored on the other half.",
    ),
    (r"factors_(?:\w+_)?probe_f1", "F1 of a linear probe on the activation: what is linearly readable, and the ceiling."),
    (r"factors_(?:\w+_)?neuron_f1", "F1 of the best MLP neuron, chosen in the same way."),
    (r"factors_(?:\w+_)?dimension_f1", "F1 of the best dimension of the activation, chosen in the same way."),
    (r"factors_\w+_auroc", "Area under the ROC curve of the chosen detector; 0.5 is chance."),
    (r"factors_\w+_found_08", "Fraction of factors with an F1 of 0.8 or more."),
    (
        r"factors_split",
        "Feature splitting: mean number of latents whose firings together detect a factor, each adding 0.03 of F1.",
    ),
    (
        r"factors_absorption_fraction",
        "Fraction of a factor's probe direction that other latents carry where its own are silent, "
        "mean over factors with a probe F1 of 0.6 or more.",
    ),
    (r"factors_full_absorption", "Fraction of tokens of a factor where one other latent stands in for its silent own latents."),
    (
        r"infomec_modularity",
        "InfoM: mean over latents of the largest fraction that one factor has of all that the latent tells of factors; 0 if "
        "all factors are equal, 1 if it tells of one factor only.",
    ),
    (
        r"infomec_compactness",
        "InfoC: mean over factors of the largest fraction that one latent has of all that latents tell of the factor; close "
        "to 0 where many rare latents share a factor.",
    ),
    (r"infomec_matched_compactness", "InfoC over the latents alone that detect one of the factors' values best."),
    (
        r"infomec_explicitness|infomec_source_.+?_explicitness",
        "InfoE: fraction of a factor's entropy that a multinomial logistic regression on all latents explains on other "
        "documents; mean over factors.",
    ),
    (r"infomec_(?:source_.+?_)?activation_explicitness", "The same from the activation instead of the latents."),
    (r"infomec_latents", "Latents that tell more of a factor than chance."),
    (r"infomec_sources", "Factors with two frequent values or more."),
    (r"infomec_tokens", "Tokens whose factors are known."),
    (r"infomec_source_.+?_latents", "Latents that tell more of this factor than the floor."),
    (r"infomec_source_.+?_latent", "Latent with the largest NMI."),
    (
        r"infomec_source_.+?_nmi_floor",
        "Largest NMI of any latent with the factor shifted along the tokens, five times: what chance reaches.",
    ),
    (
        r"infomec_source_.+?_nmi",
        "Normalized mutual information: bits that the best latent's activation tells of the factor's value, as a fraction of "
        "its entropy.",
    ),
    (r"infomec_source_.+?_(?:values|tokens)", "Values of the factor that are frequent enough, and tokens that have one."),
    (r"infomec_source_.+?_entropy_nats", "Entropy of the factor's values in nats."),
    (
        r"supervised_\w+_sufficiency",
        "Logit difference that is left with reconstructions in place of the activation, as a fraction: 1 "
        "is all of it, 0 is mean ablation.",
    ),
    (
        r"supervised_\w+_necessity",
        "Logit difference that is lost when the reconstruction is subtracted, as a fraction: 1 is as much "
        "as mean ablation loses.",
    ),
    (
        r"supervised_edit_\w+",
        "Fraction of prompts on which the edit makes the model predict what the counterfactual prompt does.",
    ),
    (r"supervised_\w+_union_f1", "F1 of up to ten latents together."),
    (r"supervised_\w+_f1", "F1 of the best latent for a value of the attribute at this position, mean over values."),
    (r"supervised_\w+_split", "Number of latents that together detect a value, mean over values."),
    (r"supervised_\w+_detected", "Fraction of values with an F1 of 0.5 or more."),
    (r"supervised_\w+_latents_interpreted", "Number of latents with an F1 of 0.8 or more for a value."),
    (r"supervised_\w+_pos_latents", "Number of latents that fire for one order of the names nine times in ten."),
    (r"supervised_\w+_variance_share", "Fraction of the activation's variance that the attribute explains."),
    (r"supervised_\w+_effect", "Effect of the attribute's supervised feature on the logit difference."),
    (
        r"supervised_\w+_occluded",
        "True if the attribute matters to the model, is outweighed by a larger one, and fewer of its values are detected.",
    ),
    (
        r"sparse_probing_sae_top_\d+_test_accuracy",
        "Accuracy of a probe on this many latents, mean over data sets; chance is 0.5.",
    ),
    (r"sparse_probing_llm_top_\d+_test_accuracy", "Accuracy of a probe on this many dimensions of the activation."),
    (r"sparse_probing_sae_test_accuracy", "Accuracy of a probe on all latents."),
    (r"sparse_probing_llm_test_accuracy", "Accuracy of a probe on the activation itself."),
    (
        r"bottleneck_accuracy",
        "Test accuracy of the sparsest L1 classifier within one standard error of the best, mean over sets.",
    ),
    (r"bottleneck_dense_accuracy", "Test accuracy of a logistic regression on the activation."),
    (r"bottleneck_gap", "Accuracy of the dense probe less that of the bottleneck."),
    (r"bottleneck_chance", "Share of the largest class among the test rows."),
    (r"bottleneck_concepts", "Mean number of latents with a weight other than 0 for a class."),
    (r"bottleneck_used_latents", "Number of latents with a weight for any class."),
    (r"bottleneck_path_\d+_accuracy", "Validation accuracy at a point of the path of penalties, the strongest first."),
    (r"bottleneck_path_\d+_concepts", "Latents for a class at that point."),
    (r"bottleneck_zeroed_own", "Recall of a class lost when its strongest concept is silenced, mean over classes with one."),
    (r"bottleneck_zeroed_others", "Accuracy on the other classes lost at the same time."),
    (r"bottleneck_zeroed_random_own", "Recall of a class lost when a random latent of about the same density is silenced."),
    (r"bottleneck_(sets|classes)", "Number of sets of labelled data, and of classes in all."),
    (
        r"scr_\w*metric_threshold_\d+",
        "Fraction of a biased probe's loss of accuracy that ablating this many latents of the spurious "
        "label restores; 1 is best.",
    ),
    (r"scr_dir\d_\w+", "The same in one direction: with label and spurious label exchanged in the second."),
    (r"tpp_\w+_total_metric", "Intended less unintended drop in accuracy; more is better."),
    (r"tpp_\w+_intended_diff_only", "Drop in accuracy of a class's own probe when this many of its latents are ablated."),
    (r"tpp_\w+_unintended_diff_only", "Drop in accuracy of the other classes' probes."),
    (
        r"absorption_\w+fraction\w*",
        "Fraction of a label's direction carried by other latents where its own are silent (Chanin et al. 2024); 0 is best.",
    ),
    (r"absorption_\w+full\w*", "Fraction of a label's tokens on which another latent replaces its own; 0 is best."),
    (r"\w+_warning", "A later study of these metrics (arXiv:2605.18229) found them unreliable."),
    (r"\w+_done", "True if the task ran."),
    (r"\w+_why", "Reason why the task did not run."),
    (r"seed", "Random seed of splits, prompts and resampling."),
    (r"labels", "File of labelled text; none stands for the embedded corpus."),
)


def definition(key: str) -> str:
    """Return the definition of an entry; empty if its name says all."""
    return next((text for pattern, text in PATTERNS if re.fullmatch(pattern, key)), "")
