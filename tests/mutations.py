"""Are the tests able to fail? Breaks a copy of the code in one place at a time and runs the test that must notice.

python tests/mutations.py              all of them, some minutes; exit status 1 if one is not caught
python tests/mutations.py NAME ...     these

Each runs in a process that is forked from this one, which has imported libraries but no code of the repository; what a test launches
is forked from a warm process (warm.py) of the copy's own, which refuses to serve any other code.
"""

import importlib
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import BinaryIO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CRASH = 70  # exit code: the tests did not run to their end


class Mutation(NamedTuple):
    file: str
    old: str  # occurs once in the file
    new: str
    test: str  # must fail with it, and passes without


ARCHITECTURES = "tests/test_architectures.py::"
SEGMENTS = "posttrain/operators/attention_segments.py"
SFT_PARITY = "tests/test_parity.py::test_sft_equals_transformers_and_cross_entropy_on_a_padded_batch"
SFT_TRL = "tests/test_parity.py::test_sft_equals_trl"
DPO_PARITY = "tests/test_parity.py::test_a_dpo_loss_equals_trl[sigmoid]"
LD_PARITY = "tests/test_parity.py::test_a_dpo_loss_equals_trl[sigmoid-ld_alpha=0.3]"
NLL_PARITY = "tests/test_parity.py::test_a_dpo_loss_equals_trl[hinge-chosen_nll_weight=0.7]"
SFT_STEPS = "tests/test_parity.py::test_five_steps_of_sft_on_two_ranks_equal_trls_trainer"
DPO_STEPS = "tests/test_parity.py::test_five_steps_of_dpo_on_two_ranks_equal_trls_trainer"
LITERAL = "tests/test_losses.py::test_a_loss_equals_its_papers_equation_on_literal_numbers"
PLANTED = "tests/test_planted.py::"
RELAYOUT = "tests/test_checkpoint.py::test_a_training_state_goes_on_in_every_layout[2]"
SERVE = "tests/test_serve.py::"
PARTS = "tests/test_serving_parts.py::"
SAMPLES = "tests/test_samples.py::test_a_run_keeps_and_shows_them"
EVALUATE = "tests/test_evaluate.py::"
DURING = EVALUATE + "test_benchmarks_during_training_are_those_of_its_result"
MODES = EVALUATE + "test_every_benchmark_in_both_modes"
LAUNCHED = "tests/test_launched.py::"
DS_CONFIG = "tests/test_mistakes.py::test_a_ds_config_that_says_too_much_is_refused"
OFFLINE = "tests/test_tracking.py::test_weights_and_biases_goes_offline_where_it_must"
STOPPED = PLANTED + "test_a_planted_fault_is_named_before_the_first_step"

EXPORT = "tests/test_export.py::"

MUTATIONS = {
    "names_that_no_row_has_are_taken": Mutation(
        "data_prep/prepare.py",
        "    refuse_unseen([*sources.training, *sources.held_out])",
        "    refuse_unseen([])",
        "tests/test_unseen.py::test_it_is_refused_before_anything_is_encoded_and_by_the_same_command_again",
    ),
    "texts_without_a_comma_are_joined": Mutation(
        "data_prep/shapes/structures.py",
        "one == other == tokenize.STRING",
        "one == other == tokenize.ENDMARKER",
        "tests/test_shapes.py::test_texts_without_a_comma_are_no_list",
    ),
    "a_message_loses_its_name": Mutation(
        "data_prep/shapes/messages.py",
        """        read["name"] = clean(""",
        """        read["nick"] = clean(""",
        "tests/test_tools.py::test_names_of_messages_are_written_as_the_template_writes_them_or_told",
    ),
    "gradients_of_a_micro_batch_overwritten_at_zero1": Mutation(
        "posttrain/engine/optimizer.py",
        "summed.add_(",
        "summed.copy_(",
        "tests/test_checkpoint.py::test_the_saved_states_were_trained_alike[bfloat16]",
    ),
    "the_embeddings_peak_taken_for_the_layers": Mutation(
        "posttrain/planning/activations.py",
        "(two.layers - one.layers)",
        "(two.embedding - one.embedding)",
        "tests/test_plan.py::test_the_peak_of_a_large_vocabulary_is_not_taken_for_that_of_the_layers",
    ),
    "buffers_left_out_of_the_result": Mutation(
        "posttrain/engine/weights.py",
        "return state | {name: buffer",
        "return state or {name: buffer",
        EXPORT + "test_buffers_are_those_of_the_base",
    ),
    "buffers_of_checkpoints_unread": Mutation(
        "posttrain/model/loading.py",
        " | saved.buffers()",
        " | {name: 0 * buffer for name, buffer in saved.buffers().items()}",
        EXPORT + "test_plain_transformers_opens_what_was_trained[activation_buffers]",
    ),
    "rope_theta_left_out": Mutation(
        "posttrain/model/describe.py",
        "values | older_names(values, config.attribute_map)",
        "values",
        EXPORT + "test_final_carries_what_the_base_had",
    ),
    "padding_row_frozen": Mutation(
        "posttrain/model/policy.py",
        "            module.padding_idx = None",
        "            pass",
        EXPORT + "test_every_embedding_that_data_uses_moves_in_every_stage",
    ),
    "result_not_opened_again": Mutation(
        "posttrain/model/export.py",
        "unseen = _open_again(staging, folder.name, model.dtype, expected)",
        "unseen = None",
        EXPORT + "test_a_folder_that_opens_as_another_model_is_not_written",
    ),
    "moments_not_restored": Mutation("posttrain/engine/shards.py", "KINDS if saved.optimizer_step else KINDS[:1]", "KINDS[:1]", RELAYOUT),
    "adams_clock_not_restored": Mutation("posttrain/engine/shards.py", "engine, saved.optimizer_step)", "engine, 1)", RELAYOUT),
    "saved_without_a_copy": Mutation(
        "posttrain/engine/writer.py",
        "copies[id(tensor)] = seen[place]",
        "copies[id(tensor)] = tensor",
        "tests/test_checkpoint.py::test_what_is_written_is_the_state_at_the_time_of_the_save",
    ),
    "checksum_not_compared": Mutation(
        "posttrain/engine/checkpoint_folder.py",
        "if files.file_facts(path / name) != facts:",
        "if False:",
        "tests/test_checkpoint.py::test_a_checksum_sees_one_bit",
    ),
    "left_over_world_size_counts": Mutation(
        "posttrain/parallel/launched.py",
        "    if rank is None:\n        return Launch()",
        '    if rank is None:\n        return Launch(world_size=_number("WORLD_SIZE") or 1)',
        LAUNCHED + "test_a_launch_is_read_from_the_environment",
    ),
    "torchruns_agent_not_known": Mutation(
        "posttrain/parallel/launched.py",
        'meets_at_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"',
        "meets_at_agent = False",
        LAUNCHED + "test_a_launch_is_read_from_the_environment",
    ),
    "master_address_not_looked_for": Mutation(
        "posttrain/parallel/launched.py",
        "if missing :=",
        "if False and",
        LAUNCHED + "test_variables_that_do_not_belong_together_are_named",
    ),
    "two_ranks_on_one_gpu": Mutation(
        "posttrain/parallel/rendezvous.py",
        "if len(beside) > 1:",
        "if False:",
        LAUNCHED + "test_ranks_of_one_machine_must_know_which_is_which",
    ),
    "restarts_meet_the_start_before": Mutation(
        "posttrain/parallel/rendezvous.py",
        "if launch.attempt else store",
        "if False else store",
        LAUNCHED + "test_a_restart_of_torchrun_does_not_meet_the_start_before",
    ),
    "gradients_sent_in_another_type": Mutation("posttrain/engine/ds_config.py", "if name in CHANGE_THE_CURVE:", "if False:", DS_CONFIG),
    "weights_sent_in_8_bits": Mutation("posttrain/engine/ds_config.py", "if name not in KEEP_THE_CURVE and", "if False and", DS_CONFIG),
    "api_key_not_looked_for": Mutation("posttrain/run/wandb_mode.py", "if not _has_key(server):", "if False:", OFFLINE),
    "silent_server_waited_for": Mutation("posttrain/run/wandb_mode.py", "return answered.is_set()", "return True", OFFLINE),
    "steps_at_rate_0_unsaid": Mutation(
        "posttrain/training/first_screen.py",
        "(end := recipe.lr_decay_iters or steps) < steps:",
        "(end := recipe.lr_decay_iters or steps) < 0:",
        "tests/test_config.py::test_a_run_whose_last_steps_change_nothing_says_so",
    ),
    "read_only_data_ends_the_run": Mutation(
        "posttrain/training/reference.py",
        "if error.errno not in CANNOT_WRITE:",
        "if True:",
        PLANTED + "test_precomputed_log_probs_are_kept_and_damaged_ones_are_refused",
    ),
    "unexpected_keys_unread": Mutation(
        "posttrain/model/loading.py",
        'set(report["unexpected_keys"])',
        "set()",
        "tests/test_model_folders.py::test_a_folder_that_cannot_be_trained_is_refused_in_one_sentence[more_layers_than_config]",
    ),
    "compiler_not_looked_for": Mutation(
        "posttrain/engine/cpu_adam.py",
        "    _check_tools()\n",
        "",
        "tests/test_setup.py::test_offload_without_a_compiler_is_refused_before_ranks_meet",
    ),
    "compiled_for_another_cpu": Mutation(
        "posttrain/engine/cpu_adam.py",
        "platform.machine()}-{kind}",
        "platform.machine()}",
        "tests/test_setup.py::test_compiled_code_is_kept_apart_by_versions_and_kind_of_cpu",
    ),
    "first_index_instead_of_all": Mutation(
        "launch/set_up.py",
        ', "--index-strategy=unsafe-best-match"',
        "",
        "tests/test_setup.py::test_two_terminals_set_up_one_checkout_by_uv_with_pips_settings",
    ),
    "sft_shifted_by_one": Mutation(
        "posttrain/data/packing.py", "self._train(start + before,", "self._train(start + before + 1,", SFT_PARITY
    ),
    "dpo_shifted_by_one": Mutation(
        "posttrain/data/packing.py", "last = start + len(prompt) - 1 ", "last = start + len(prompt) ", DPO_PARITY
    ),
    "last_micro_batch_alone_counted": Mutation("posttrain/training/step.py", "add_sums(sums, part_sums)", "sums = part_sums", SFT_STEPS),
    "sft_mean_of_micro_batches": Mutation(
        "posttrain/objectives/likelihood.py", 'return nll / totals["tokens"]', "return nll / len(batch.targets)", SFT_TRL
    ),
    "dpo_mean_instead_of_sum": Mutation(
        "posttrain/objectives/answers.py",
        "logps.double()).view(-1, 2)",
        "logps.double()).view(-1, 2) / batch.answer_lengths.clamp(min=1)[:, None]",
        DPO_PARITY,
    ),
    "dpo_mean_of_micro_batches": Mutation(
        "posttrain/objectives/preference.py", 'share = (losses.sum() / totals["pairs"]', "share = (losses.mean()", DPO_PARITY
    ),
    "nll_per_pair_instead_of_per_token": Mutation(
        "posttrain/objectives/preference.py", '* nll / totals["tokens"]', '* nll / totals["pairs"]', NLL_PARITY
    ),
    "world_size_factor_missing_sft": Mutation("posttrain/engine/update.py", "loss * dist.get_world_size()", "loss", SFT_STEPS),
    "world_size_factor_missing_dpo": Mutation("posttrain/engine/update.py", "loss * dist.get_world_size()", "loss", DPO_STEPS),
    "step_after_every_micro_batch": Mutation(
        "posttrain/training/step.py", "is_last=number == len(share.micro_batches)", "is_last=True", SFT_STEPS
    ),
    "clipping_off": Mutation(
        "posttrain/engine/ds_config.py", '"gradient_clipping": recipe.grad_clip,', '"gradient_clipping": 0.0,', SFT_STEPS
    ),
    "metrics_of_one_rank": Mutation("posttrain/training/step.py", "dist.all_reduce(everything)", "pass", SFT_STEPS),
    "prompt_tokens_trained_sft": Mutation(
        "posttrain/data/packing.py",
        "before = np.flatnonzero(labels[1:] != IGNORE)",
        "labels, before = ids, np.arange(len(ids) - 1)",
        SFT_PARITY,
    ),
    "prompt_tokens_trained_dpo": Mutation(
        "posttrain/data/packing.py",
        "self._train(np.arange(last, last + len(chosen)), chosen, shorter)",
        "self._train(np.arange(start, last + len(chosen)), np.concatenate([prompt[1:], chosen]), shorter)",
        DPO_PARITY,
    ),
    "end_token_not_trained": Mutation(
        "posttrain/data/chatml.py",
        "[Fixed((self.end_id,), True)",
        "[Fixed((self.end_id,), False)",
        "tests/test_chat.py::test_trained_tokens_are_the_answers_and_their_end_tokens",
    ),
    "chosen_and_rejected_swapped": Mutation(
        "posttrain/objectives/preference.py", "PairLogps(logps[0::2], logps[1::2])", "PairLogps(logps[1::2], logps[0::2])", DPO_PARITY
    ),
    "reference_is_the_policy": Mutation(
        "posttrain/objectives/preference.py",
        "answer_sums(self.reference(batch), batch)",
        "answer_sums(self.policy(batch), batch)",
        DPO_PARITY,
    ),
    "dropout_left_on": Mutation(
        "posttrain/model/policy.py",
        'setattr(module, name, dropout if name == "attention_dropout" else 0.0)',
        "pass",
        "tests/test_mistakes.py::test_dropout_is_the_recipes_not_the_checkpoints",
    ),
    "dropout_not_looked_for": Mutation(
        "posttrain/training/start_checks.py",
        "    if not recipe.dropout:",
        "    if False:",
        STOPPED + "[dropout_left_on]",
    ),
    "positions_not_restarted": Mutation(  # seen by DPO's second answer; between examples RoPE is relative, so no value would change
        "posttrain/data/packing.py", "np.arange(seen, seen + len(ids))", "np.arange(start, start + len(ids))", DPO_PARITY
    ),
    "attention_across_examples": Mutation(
        "posttrain/data/packing.py", "pack(self.segments)", "pack([Segment(0, self.length)])", SFT_PARITY
    ),
    "frequencies_of_the_whole_micro_batch": Mutation(
        "posttrain/operators/positions.py",
        "if self.packing is None:",
        "if True:",
        "tests/test_positions.py::test_an_example_has_the_frequencies_that_it_has_alone[longrope]",
    ),
    "frequencies_of_what_came_before": Mutation(
        "posttrain/operators/positions.py",
        "type(module)(module.config).to(x.device)(x,",
        "type(module).forward(module, x,",
        "tests/test_positions.py::test_an_example_has_the_frequencies_that_it_has_alone[dynamic]",
    ),
    "window_off_by_one": Mutation(
        SEGMENTS,
        "key <= position - window",
        "key < position - window",
        ARCHITECTURES + "test_packed_rows_are_those_of_each_alone[a window]",
    ),
    "window_of_the_other_kernel_off_by_one": Mutation(
        "posttrain/operators/attention_varlen.py",
        "window_size=(rule.window - 1, 0)",
        "window_size=(rule.window, 0)",
        "tests/test_gpu_paths.py::test_windows_and_shared_prompts_are_those_of_every_score_in_memory",
    ),
    "sink_ignored": Mutation(
        SEGMENTS,
        "    if sinks is not None:\n        output *=",
        "    if False:\n        output *=",
        ARCHITECTURES + "test_packed_rows_are_those_of_each_alone[windows and sinks]",
    ),
    "sink_without_gradient": Mutation(
        SEGMENTS,
        "of_sinks = -(shares",
        "of_sinks = (shares",
        ARCHITECTURES + "test_a_window_and_sinks_on_the_cpu_equal_every_score_in_memory",
    ),
    "state_not_reset": Mutation(
        "posttrain/operators/mixers.py",
        "if packing is None:",
        "if True:",
        ARCHITECTURES + "test_packed_rows_are_those_of_each_alone[gated delta rule]",
    ),
    "state_of_the_prompt_not_handed_on": Mutation(
        "posttrain/operators/mixers.py",
        "rows = np.where(place < prefix, prefix_start + place,",
        "rows = np.where(place < prefix, 0,",
        ARCHITECTURES + "test_a_pair_that_shares_its_prompt_is_that_with_two_prompts[gated delta rule]",
    ),
    "scale_ignored": Mutation(
        "posttrain/operators/logprob.py",
        "if scale != 1.0:",
        "if False:",
        ARCHITECTURES + "test_packed_rows_are_those_of_each_alone[a scaled head]",
    ),
    "bound_without_its_derivative": Mutation(
        "posttrain/operators/logprob.py",
        "if ctx.cap:",
        "if False:",
        ARCHITECTURES + "test_the_head_differentiates_scale_bound_and_bias[64-1.0-2.0-False]",
    ),
    "gradients_not_looked_at": Mutation(
        "posttrain/model/proof.py",
        "if not worst <= limit else None",
        "if False else None",
        ARCHITECTURES + "test_a_gradient_that_is_wrong_is_seen_at_load",
    ),
    "windows_not_shortened": Mutation(
        "posttrain/model/proof.py",
        "setattr(holder, name, SHORT)",
        "pass",
        ARCHITECTURES + "test_the_proof_shortens_windows_so_that_its_rows_are_longer",
    ),
    "layers_of_the_head_taken_for_pictures": Mutation(
        "posttrain/model/classes.py",
        "parts = [model] if sees_text_only else [",
        "parts = [",
        ARCHITECTURES + "test_all_of_a_model_that_reads_text_alone_is_trained[a head of several layers]",
    ),
    "quantized_again_when_saved": Mutation(
        "posttrain/model/loading.py",
        "model._weight_conversions, model.is_quantized = None, False",
        "pass",
        "tests/test_quantized.py::test_fp8_is_multiplied_out_exactly_and_never_written_again[dtype1]",
    ),
    "router_draws_experts": Mutation(
        "posttrain/model/policy.py",
        "module.training, module.train = False, partial(_as_in_use, module)",
        "pass",
        "tests/test_model_folders.py::test_noise_of_routers_is_off_and_said[phimoe-input_jitter_noise and what PhimoeTopKRouter does in "
        "training only is off-noise1]",
    ),
    "rejected_answer_sees_the_chosen_one": Mutation(
        "posttrain/data/packing.py", "prefix=(start, start + len(prompt))", "prefix=(start, start + len(prompt) + len(chosen))", DPO_PARITY
    ),
    "tail_weighted_in_the_policy_only": Mutation(
        "posttrain/objectives/preference.py",
        "return self.pairs(answer_sums(self.reference(batch), batch))",
        "sums = answer_sums(self.reference(batch), batch).sum(1)\n        return PairLogps(sums[0::2], sums[1::2])",
        LD_PARITY,
    ),
    "smoothing_ignored": Mutation(
        "posttrain/objectives/losses.py",
        "return -logsigmoid(logits) * (1 - label_smoothing) - l",
        "return -logsigmoid(logits) - 0 * l",
        LITERAL,
    ),
    "ipo_sum_averaged": Mutation(
        "posttrain/objectives/losses.py", "(delta(policy, reference) - 1 / (2", "(delta(policy, reference) / 4 - 1 / (2", LITERAL
    ),
    "wrong_kernels_go_unseen": Mutation(
        "posttrain/operators/layers.py",
        "if too_far.any():",
        "if False:",
        "tests/test_kernels.py::test_wrong_kernels_in_a_layer_leave_it_as_it_was",
    ),
    "wrong_kernels_stay": Mutation(
        "posttrain/operators/layers.py",
        "part.__class__ = kind",
        "continue",
        "tests/test_kernels.py::test_wrong_kernels_in_a_layer_leave_it_as_it_was",
    ),
    "nan_is_no_difference": Mutation(
        "posttrain/operators/layers.py",
        "too_far = ~(after <= FARTHER * before + ROUNDING)",
        "too_far = after > FARTHER * before + ROUNDING",
        "tests/test_kernels.py::test_wrong_kernels_in_a_layer_leave_it_as_it_was",
    ),
    "compiled_gradient_of_the_log_probs": Mutation(
        "posttrain/operators/logprob.py",
        "is_target.float() - (logits",
        "is_target.float() + (logits",
        "tests/test_kernels.py::test_compiled_log_probs_equal_plain_ones",
    ),
    "products_not_added_in_float32": Mutation(
        "posttrain/operators/logprob.py",
        "ctx.way.adds_products and grad",
        "not ctx.way.adds_products and grad",
        "tests/test_gpu_paths.py::test_products_that_add_themselves_are_more_exact",
    ),
    "prefetched_weights_not_counted": Mutation(
        "posttrain/planning/memory.py",
        "zero.live_parameters + zero.prefetch",
        "zero.live_parameters",
        "tests/test_plan.py::test_rank_0_of_many_gpus_holds_and_sends_what_is_predicted",
    ),
    "layout_of_another_setting_kept": Mutation(
        "posttrain/training/auto_layout.py",
        'layout["as"] != _setting(recipe, device)',
        'layout["as"] is None',
        "tests/test_auto_layout.py::test_a_run_keeps_its_layout_in_the_same_setting_only",
    ),
    "vllm_of_other_versions_loaded": Mutation(
        "posttrain/serving/vllm_batching.py",
        "misfit := _misfit()",
        "misfit := None",
        PARTS + "test_a_vllm_that_was_made_for_other_versions_is_not_loaded",
    ),
    "answers_see_all_of_their_segment": Mutation(
        "posttrain/operators/attention_varlen.py",
        "window_size=(rule.window - 1, 0)",
        "window_size=(rule.window - 1, -1)",
        "tests/test_gpu_paths.py::test_one_call_for_all_segments_equals_grouped_calls",
    ),
    "gradient_of_the_log_probs": Mutation("posttrain/operators/logprob.py", ".mul_(-grad[:, None])", ".mul_(grad[:, None])", SFT_PARITY),
    "validation_drops_an_example": Mutation(
        "posttrain/training/step.py",
        "indices = np.arange(min(",
        "indices = np.arange(-1 + min(",
        "tests/test_runs.py::test_the_result_loads_in_plain_transformers_with_its_last_validation_loss",
    ),
    "bad_step_applied": Mutation(
        "posttrain/engine/update.py",
        "if self.is_open() else None",
        "if True else None",
        PLANTED + "test_a_spike_is_not_applied_and_three_in_a_row_stop_the_run",
    ),
    "reference_not_compared": Mutation(
        "posttrain/training/start_checks.py",
        "if reference.weights.get(name) != value]",
        "if False]",
        PLANTED + "test_a_planted_fault_ends_all_ranks_with_one_message",
    ),
    "ranks_not_compared": Mutation(
        "posttrain/parallel/ranks.py",
        "enumerate(seen) if value != seen[0]]",
        "enumerate(seen) if False]",
        STOPPED + "[one_rank_with_another_token]",
    ),
    "template_not_compared": Mutation(
        "posttrain/training/inputs.py",
        "if forms[0] != forms[1]:",
        "if False:",
        STOPPED + "[data_of_another_template]",
    ),
    "refused_before_the_body_is_read": Mutation(
        "posttrain/serving/access.py",
        "LINGER_SECONDS, LINGER_BYTES = 5,",
        "LINGER_SECONDS, LINGER_BYTES = 0,",
        SERVE + "test_a_refusal_reaches_a_client_that_sends_first",
    ),
    "any_host_may_ask": Mutation(
        "posttrain/serving/access.py",
        "if not self.api_key and not self._is_own(host):",
        "if False:",
        SERVE + "test_other_sites_cannot_use_it_through_a_browser",
    ),
    "a_wrong_key_passes": Mutation(
        "posttrain/serving/access.py",
        'scheme.lower() != "bearer" or not hmac',
        'scheme.lower() != "bearer" and hmac',
        SERVE + "test_the_key_is_needed_where_there_is_one",
    ),
    "the_queue_has_no_end": Mutation(
        "posttrain/serving/places.py",
        "if self.taken >= self.most:",
        "if False:",
        SERVE + "test_beyond_the_queue_and_beyond_the_time",
    ),
    "a_burst_overtakes_the_count": Mutation(
        "posttrain/serving/places.py", "self.taken += 1", "pass", SERVE + "test_a_burst_gets_no_more_places_than_there_are"
    ),
    "who_comes_late_is_cut": Mutation(
        "posttrain/serving/connections.py",
        "longest = next(iter(self.waiting))",
        "longest = self",
        "tests/test_serving_limits.py::test_beyond_the_most_connections_the_one_that_kept_waiting_longest_is_cut",
    ),
    "generation_that_hangs_is_healthy": Mutation(
        "posttrain/serving/batching.py",
        "> HANG_SECONDS",
        "> 10**9",
        "tests/test_serving_limits.py::test_health_is_bad_while_generation_hangs_and_good_afterwards",
    ),
    "a_stalled_reader_keeps_its_place": Mutation(
        "posttrain/serving/answers.py",
        "asyncio.timeout(self.seconds)",
        "asyncio.timeout(None)",
        PARTS + "test_a_client_that_stops_reading_loses_its_place",
    ),
    "a_marker_in_a_text_becomes_a_token": Mutation(
        "posttrain/data/encoding.py",
        "        _changed.wait_for(lambda: backend not in _encoding)",
        "        pass",
        "tests/test_chat.py::test_no_call_changes_the_tokenizer_while_another_thread_encodes",
    ),
    "a_line_ends_inside_a_text": Mutation(
        "posttrain/common/files.py",
        "            yield line\n\n\ndef _texts",
        "            yield from map(str.encode, line.decode().splitlines(keepends=True))\n\n\ndef _texts",
        SAMPLES,
    ),
    "an_answer_goes_on_without_its_reader": Mutation(
        "posttrain/serving/batching.py",
        "self.manager.cancel_request(request)",
        "pass",
        SERVE + "test_beyond_the_queue_and_beyond_the_time",
    ),
    "an_unread_option_is_ignored": Mutation(
        "posttrain/serving/schema.py", 'extra="forbid"', 'extra="ignore"', SERVE + "test_what_cannot_be_done_is_refused_by_name"
    ),
    "chance_by_place_in_the_batch": Mutation(
        "posttrain/serving/batching.py",
        "sampling.uniform(at) if sampling.temperature else 0 for",
        "sampling.uniform(len(states)) if sampling.temperature else 0 for",
        SERVE + "test_a_seed_gives_one_answer_whoever_else_is_served",
    ),
    "top_k_of_all": Mutation(
        "posttrain/serving/sampling.py",
        "device=logits.device) >= top_k, float",
        "device=logits.device) > top_k, float",
        PARTS + "test_a_batch_may_mix_all_ways_of_sampling",
    ),
    "a_stop_text_is_said": Mutation(
        "posttrain/serving/text.py", "return text[:found]", "return text", PARTS + "test_nothing_of_a_stop_text_or_behind_it_is_said"
    ),
    "half_a_character_is_said": Mutation(
        "posttrain/serving/text.py", "if text.endswith(BROKEN) and", "if False and", PARTS + "test_text_in_pieces_is_the_text"
    ),
    "half_a_vote_stays": Mutation(
        "posttrain/serving/votes.py",
        "os.ftruncate(file.fileno(), size)",
        "pass",
        PARTS + "test_a_vote_that_cannot_be_written_leaves_nothing",
    ),
    "a_checkpoints_own_limit_of_answers": Mutation(
        "posttrain/evaluation/measure.py",
        "sorted(assistant.stops), None",
        "sorted(assistant.stops), settings.max_new_tokens",
        MODES,
    ),
    "other_examples_on_other_ranks": Mutation(
        "posttrain/evaluation/measure.py", "draw, skipped = sampler.sample, rank", "draw, skipped = sampler.sample, 0", MODES
    ),
    "examples_in_one_turn": Mutation("posttrain/training/benchmarks.py", "fewshot_as_multiturn=True", "fewshot_as_multiturn=False", DURING),
    "benchmarks_at_validations_only": Mutation(
        "posttrain/training/validation.py", "recipe.benchmark_interval or recipe.eval_interval", "recipe.eval_interval", DURING
    ),
    "one_order_only": Mutation(
        "posttrain/evaluation/judge.py",
        "((prompt, a, b), (prompt, b, a))",
        "((prompt, a, b), (prompt, a, b))",
        EVALUATE + "test_a_judge_is_asked_in_both_orders",
    ),
    "every_comparison_for_itself": Mutation(
        "posttrain/evaluation/compare.py", "* (len(p_values) - rank)", "* 1", EVALUATE + "test_many_comparisons_need_stronger_evidence"
    ),
    "prompts_that_never_fit": Mutation(
        "posttrain/training/samples.py",
        "answers[index]) == mine[index].most or",
        "answers[index]) > mine[index].most or",
        "tests/test_samples.py::test_answers_are_those_of_transformers_in_every_layout",
    ),
}


def mutate(folder: Path, mutation: Mutation) -> None:
    path = folder / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, (
        f"{mutation.old!r} is {text.count(mutation.old)} times in {mutation.file}: bring the list up to date"
    )
    path.write_text(text.replace(mutation.old, mutation.new))


def import_libraries() -> None:
    """Import what the tests need, but nothing of this repository: the copies have code of their own."""
    for name in (
        "pytest",
        "torch",
        "deepspeed",
        "transformers",
        "datasets",
        "trl",
        "lm_eval.evaluator",
        "starlette.applications",
        "psutil",
    ):
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"


def _is_of_repository(path: str) -> bool:
    """Whether a place that Python imports from holds code of the repository; its environment, .venv, may lie inside and does not."""
    return Path(path).is_relative_to(ROOT) and not Path(path).is_relative_to(sys.prefix)


def start(folder: Path, *tests: str) -> tuple[int, BinaryIO]:
    """Run tests in a copy, in a process that is forked from this one; returns its id and the file that it prints to."""
    output = tempfile.TemporaryFile()  # noqa: SIM115 - read once the process has ended
    if pid := os.fork():
        return pid, output
    code = CRASH
    try:
        os.setsid()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path[:] = [str(folder), *(path for path in sys.path if not _is_of_repository(path))]
        code = importlib.import_module("pytest").main(["-q", "-x", "-p", "no:cacheprovider", *tests])
        others = [module for name, module in sys.modules.items() if name.split(".")[0] in ("posttrain", "conftest", "data_prep")]
        assert all(Path(module.__file__).is_relative_to(folder) for module in others if getattr(module, "__file__", None)), (
            "not the copy's code"
        )
        sys.stdout.flush()
    except BaseException:
        code = CRASH
        traceback.print_exc()
    finally:
        os._exit(code)


def result(code: int, output: BinaryIO) -> str | None:
    """None where the tests have passed, else the assertion that failed."""
    output.seek(0)
    text = output.read().decode(errors="replace")
    if code == 0:
        return None
    failed = re.findall(r"^E +(AssertionError.*|assert .*|Failed: .*|ConnectionResetError.*|BrokenPipeError.*)", text, re.MULTILINE)
    if code != 1 or not failed:  # not found, not run, or a crash: that is not a test that noticed
        raise RuntimeError(text)
    return failed[0]


def try_all(folders: list[Path], chosen: dict[str, Mutation]) -> list[str]:
    """Try mutations, one in each copy at a time; returns the names of those that no test has caught."""
    waiting, running, missed = list(chosen), {}, []
    while waiting or running:
        while waiting and folders:
            title, folder = waiting.pop(0), folders.pop()
            original = (folder / chosen[title].file).read_text()
            mutate(folder, chosen[title])
            pid, output = start(folder, chosen[title].test)
            running[pid] = title, folder, original, output, time.monotonic()
        pid, status = os.wait()
        title, folder, original, output, started = running.pop(pid)
        (folder / chosen[title].file).write_text(original)
        folders.append(folder)
        try:
            failed = result(os.waitstatus_to_exitcode(status), output)
        except RuntimeError as error:  # the test broke down instead of noticing: look at it, and at the others all the same
            print(error)
            failed = None
        seconds = time.monotonic() - started
        missed += [] if failed else [title]
        print(f"{'caught' if failed else 'MISSED'}  {title:<36} {seconds:4.0f} s  {chosen[title].test}\n        {failed}", flush=True)
    return missed


def main(names: list[str]) -> None:
    if "--help" in names:
        sys.exit(__doc__)
    if unknown := set(names) - set(MUTATIONS):
        sys.exit(f"there is no mutation {', '.join(sorted(unknown))}; there are: {', '.join(MUTATIONS)}")
    chosen = {name: MUTATIONS[name] for name in names or MUTATIONS}
    os.environ |= {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # a thread of pyarrow's
    import_libraries()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / f"copy_{number}" for number in range(min(os.cpu_count() or 1, len(chosen)))]
        for folder in folders:
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__"))
        tests = sorted({mutation.test for mutation in chosen.values()})
        pid, output = start(folders[0], *tests)
        if failed := result(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output):
            sys.exit(f"the tests fail without any mutation; mend them first: {failed}")
        print(f"{len(tests)} tests pass without a mutation", flush=True)
        missed = try_all(folders, chosen)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutations were caught")
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
