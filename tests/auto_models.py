"""A tiny model of every `AutoModelFor...` class: its config, and rows that it can be trained on.

Images are random, sounds too: what is asked of these models is that two engines train them alike. A class of
which transformers can train no model is in the table as well, with what its models say.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.utils import is_torchaudio_available

VOCABULARY = 40
LENGTH = 6
IMAGE = 32
IGNORED = -100
Row = dict[str, Any]
Draw = torch.Generator

_BERT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
_LAYERS: Mapping[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
_IMAGES: Mapping[str, Any] = {**_LAYERS, "image_size": IMAGE, "patch_size": 16}
_LLAMA: Mapping[str, Any] = {**_LAYERS, "vocab_size": VOCABULARY, "pad_token_id": 0}


@dataclass(frozen=True)
class Tiny:
    """What a class of the table is tried with.

    Attributes:
        config: makes the config of a tiny model.
        row: makes one row; labels differ in how much they hold, where the task allows it.
        collator: makes a micro-batch of rows.
        refused: how the refusal begins, of a model that cannot be trained; empty for one that can.
        not_exact: why the gradient depends on how a window is cut; empty where it does not.
        native_fails: what the native Trainer raises, for a model that hfbridge trains all the same.
    """

    config: Callable[[], Any]
    row: Callable[[Draw], Row]
    collator: Callable[[list[Row]], dict[str, Any]]
    refused: str = ""
    not_exact: str = ""
    native_fails: str = ""

    def rows(self, count: int, *, seed: int = 3) -> list[Row]:
        """Make rows; the same arguments give the same ones."""
        draw = torch.Generator().manual_seed(seed)
        return [self.row(draw) for _ in range(count)]

    def model(self, auto_class: str) -> Any:
        """Build the model through its auto class; the same weights each time."""
        hf.set_seed(7)
        return getattr(hf, auto_class).from_config(self.config())


def stacked(rows: list[Row]) -> dict[str, Any]:
    """Stack the columns; objects, whose number differs from row to row, stay a list."""
    batch: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        are_objects = name in ("mask_labels", "class_labels") or not isinstance(values[0], Tensor)
        batch[name] = values if are_objects else torch.stack(values)
    return batch


def with_loss(rows: list[Row]) -> dict[str, Any]:
    """Stack, and ask a contrastive model for its loss."""
    return {**stacked(rows), "return_loss": True}


def integers(draw: Draw, low: int, high: int, *shape: int) -> Tensor:
    """Draw integers from low to high - 1."""
    return torch.randint(low, high, shape, generator=draw)


def pixels(draw: Draw, *shape: int) -> Tensor:
    """Draw an image."""
    return torch.rand(*(shape or (3, IMAGE, IMAGE)), generator=draw)


def tokens(draw: Draw, length: int = LENGTH) -> Row:
    """Draw a text."""
    return {"input_ids": integers(draw, 3, VOCABULARY, length), "attention_mask": torch.ones(length).long()}


def holes(draw: Draw, labels: Tensor) -> Tensor:
    """Ignore some labels, of each row a different number; never the last one."""
    ignored = torch.rand(labels.shape, generator=draw) < torch.rand((), generator=draw) * 0.8
    ignored.view(-1)[-1] = False
    return labels.masked_fill(ignored, IGNORED)


def image_and_label(draw: Draw) -> Row:
    """Draw an image and its class."""
    return {"pixel_values": pixels(draw), "labels": integers(draw, 0, 3)}


def image(draw: Draw) -> Row:
    """Draw an image without any label."""
    return {"pixel_values": pixels(draw)}


def sound(draw: Draw) -> Row:
    """Draw a sound."""
    return {"input_values": torch.randn(400, generator=draw)}


def causal(draw: Draw) -> Row:
    """Draw a text to be continued."""
    row = tokens(draw)
    return {**row, "labels": holes(draw, row["input_ids"])}


def masked(draw: Draw) -> Row:
    """Draw a text some of whose words are asked."""
    row = tokens(draw)
    return {**row, "labels": holes(draw, integers(draw, 3, VOCABULARY, LENGTH))}


def span(draw: Draw) -> Row:
    """Draw a text and an answer in it."""
    start = int(integers(draw, 0, LENGTH))
    return {
        **tokens(draw),
        "start_positions": torch.tensor(start),
        "end_positions": integers(draw, start, LENGTH),
    }


def boxes(draw: Draw) -> Row:
    """Draw an image with one to three objects."""
    count = int(integers(draw, 1, 4))
    return {
        "pixel_values": pixels(draw),
        "labels": {
            "class_labels": integers(draw, 0, 3, count),
            "boxes": torch.rand(count, 4, generator=draw) * 0.4 + 0.1,
        },
    }


def regions(draw: Draw, size: int) -> Row:
    """Draw an image with the masks of one to three regions."""
    count = int(integers(draw, 1, 4))
    mask = (torch.rand(count, size, size, generator=draw) > 0.5).float()
    return {"pixel_values": pixels(draw), "mask_labels": mask, "class_labels": integers(draw, 0, 3, count)}


def segments(draw: Draw) -> Row:
    """Draw an image, and boxes and masks of its objects."""
    row = boxes(draw)
    count = len(row["labels"]["class_labels"])
    row["labels"]["masks"] = (torch.rand(count, IMAGE, IMAGE, generator=draw) > 0.5).float()
    return row


def text_and_image(draw: Draw) -> Row:
    """Draw a text that begins with the four places of an image."""
    ids = torch.cat([torch.full((4,), 2), integers(draw, 3, VOCABULARY, LENGTH)])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels(draw),
        "labels": torch.cat([torch.full((4,), IGNORED), holes(draw, ids[4:])]),
    }


def _resnet() -> Any:
    return hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def _detr() -> Any:
    return hf.DetrConfig(
        backbone_config=_resnet(),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        num_labels=3,
    )


def _wav2vec2(**more: Any) -> Any:
    return hf.Wav2Vec2Config(
        **{
            **_LAYERS,
            "vocab_size": VOCABULARY,
            "conv_dim": (8, 8),
            "conv_stride": (5, 4),
            "conv_kernel": (10, 8),
            "num_feat_extract_layers": 2,
            "feat_extract_norm": "layer",
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 8,
            "mask_time_prob": 0.0,
            **more,
        }
    )


def _clip_text() -> dict[str, Any]:
    return {**_LAYERS, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 1}


def _sapiens(**more: Any) -> Any:
    head = {"conv_out_channels": [8], "conv_kernel_sizes": [1], "upsample_out_channels": [8]}
    return hf.Sapiens2Config(
        **{**_IMAGES, "num_key_value_attention_heads": 2, "head_config": head, "num_labels": 3, **more}
    )


def _bert(**more: Any) -> Callable[[], Any]:
    return lambda: hf.BertConfig(**_BERT, **more)


def _vit(**more: Any) -> Callable[[], Any]:
    return lambda: hf.ViTConfig(**_IMAGES, **more)


def _whisper() -> Any:
    return hf.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=10,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def _llava() -> Any:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_IMAGES),
        text_config=hf.LlamaConfig(**_LLAMA),
        image_token_index=2,
        vision_feature_layer=-1,
    )


def _depth(draw: Draw) -> Row:
    return {"pixel_values": pixels(draw), "labels": torch.rand(IMAGE, IMAGE, generator=draw) + 0.5}


def _document(draw: Draw) -> Row:
    return {**span(draw), "bbox": integers(draw, 0, 30, LENGTH, 1).repeat(1, 4)}


def _choices(draw: Draw) -> Row:
    return {"input_ids": integers(draw, 3, VOCABULARY, 3, LENGTH), "labels": integers(draw, 0, 3)}


def _pretraining(draw: Draw) -> Row:
    return {**masked(draw), "next_sentence_label": integers(draw, 0, 2)}


def _table(draw: Draw) -> Row:
    kinds = torch.zeros(LENGTH, 7).long()
    kinds[3:, 0], kinds[3:, 1] = 1, 1
    kinds[3:, 2] = torch.arange(1, LENGTH - 2)
    return {**tokens(draw), "token_type_ids": kinds, "labels": integers(draw, 0, 2, LENGTH)}


def _question_about_image(draw: Draw) -> Row:
    return {**tokens(draw), "pixel_values": pixels(draw), "labels": torch.rand(3, generator=draw)}


def _patches(draw: Draw) -> Row:
    hidden = torch.rand((IMAGE // 16) ** 2, generator=draw) < 0.5
    hidden[0] = True
    return {"pixel_values": pixels(draw), "bool_masked_pos": hidden}


def _segmentation(draw: Draw) -> Row:
    labels = integers(draw, 0, 3, IMAGE, IMAGE)
    hidden = torch.rand(IMAGE, IMAGE, generator=draw) < torch.rand((), generator=draw)
    return {"pixel_values": pixels(draw), "labels": labels.masked_fill(hidden, 255)}


def _speech(draw: Draw) -> Row:
    labels = holes(draw, integers(draw, 3, VOCABULARY, LENGTH))
    return {"input_features": torch.randn(8, 20, generator=draw), "labels": labels}


def _transcript(draw: Draw) -> Row:
    count = int(integers(draw, 1, 5))
    labels = torch.cat([integers(draw, 3, VOCABULARY, count), torch.full((5 - count,), IGNORED)])
    return {**sound(draw), "labels": labels}


def _pair(draw: Draw) -> Row:
    text = tokens(draw)
    text["input_ids"][-1] = 1
    return {**text, "pixel_values": pixels(draw)}


_PYRAMID: dict[str, Any] = {  # of Segformer and of GLPN
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 8],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 1],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
}
_TRANSDUCER: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "decoder_hidden_size": 8,
    "num_decoder_layers": 1,
    "pad_token_id": 0,
    "blank_token_id": VOCABULARY - 1,
}


def _parakeet() -> Any:
    return hf.ParakeetEncoderConfig(
        **_LAYERS, subsampling_conv_channels=8, num_mel_bins=16, conv_kernel_size=3
    )


def _spoken(draw: Draw) -> Row:
    labels = integers(draw, 3, VOCABULARY - 1, 4)
    labels[int(integers(draw, 1, 5)) :] = 0
    return {
        "input_features": torch.randn(64, 16, generator=draw),
        "attention_mask": torch.ones(64).long(),
        "labels": labels,
        "decoder_input_ids": integers(draw, 3, VOCABULARY - 1, 5),
    }


_NO_LOSS = "returned no loss"
_NO_TRAINING = "does not train"

TABLE: dict[str, Tiny] = {
    "AutoModelForAudioClassification": Tiny(
        lambda: _wav2vec2(num_labels=3), lambda d: {**sound(d), "labels": integers(d, 0, 3)}, stacked
    ),
    "AutoModelForAudioFrameClassification": Tiny(
        lambda: _wav2vec2(num_labels=3),
        lambda d: {**sound(d), "labels": torch.eye(3)[integers(d, 0, 3, 18)]},
        stacked,
    ),
    "AutoModelForAudioTokenization": Tiny(
        lambda: hf.DacConfig(
            encoder_hidden_size=4,
            downsampling_ratios=[2, 2],
            decoder_hidden_size=8,
            n_codebooks=2,
            codebook_size=8,
            codebook_dim=2,
        ),
        lambda d: {"input_values": torch.randn(1, 64, generator=d)},
        stacked,
        refused=r"a loss of shape \(2,\)",
    ),
    "AutoModelForAudioXVector": Tiny(
        lambda: _wav2vec2(
            num_labels=3, tdnn_dim=(8, 8), tdnn_kernel=(3, 1), tdnn_dilation=(1, 1), xvector_output_dim=8
        ),
        lambda d: {**sound(d), "labels": integers(d, 0, 3)},
        stacked,
    ),
    "AutoModelForCTC": Tiny(
        lambda: _wav2vec2(pad_token_id=0, ctc_loss_reduction="mean", ctc_zero_infinity=True),
        _transcript,
        stacked,
    ),
    "AutoModelForCausalLM": Tiny(lambda: hf.LlamaConfig(**_LLAMA), causal, stacked),
    "AutoModelForDecision": Tiny(
        lambda: hf.JevConfig(hidden_size=16, text_config=hf.Qwen2Config(**_LLAMA, num_key_value_heads=1)),
        lambda d: {
            **tokens(d),
            "marks": torch.tensor([3]),
            "num_options": torch.tensor([2]),
            "question_type_ids": torch.tensor([1]),
        },
        stacked,
        refused=r"a bare tensor of shape \(2,\)",
    ),
    "AutoModelForDepthEstimation": Tiny(
        lambda: hf.GLPNConfig(
            **_PYRAMID,
        ),
        _depth,
        stacked,
        native_fails="modified by an inplace operation",  # `loss *= 1` on the result of a square root,
        not_exact="a root of a mean",
    ),
    "AutoModelForDocumentQuestionAnswering": Tiny(
        lambda: hf.LayoutLMConfig(**_BERT, max_2d_position_embeddings=32), _document, stacked
    ),
    "AutoModelForImageClassification": Tiny(_vit(num_labels=3), image_and_label, stacked),
    "AutoModelForImageMatting": Tiny(
        lambda: hf.Sapiens2Config(
            **_IMAGES,
            num_key_value_attention_heads=2,
            head_config={
                "upsample_out_channels": [8],
                "conv_out_channels": [8],
                "conv_kernel_sizes": [1],
            },
        ),
        lambda d: {**image(d), "labels": pixels(d, 1, IMAGE, IMAGE)},
        stacked,
        refused=_NO_TRAINING,
    ),
    "AutoModelForImageSegmentation": Tiny(
        _detr, segments, stacked, not_exact="divided by the number of objects"
    ),
    "AutoModelForImageTextToText": Tiny(_llava, text_and_image, stacked),
    "AutoModelForImageToImage": Tiny(
        lambda: hf.Swin2SRConfig(
            image_size=IMAGE, embed_dim=8, depths=[1], num_heads=[2], window_size=4, upscale=2
        ),
        lambda d: {**image(d), "labels": pixels(d, 3, 2 * IMAGE, 2 * IMAGE)},
        stacked,
        refused=_NO_TRAINING,
    ),
    "AutoModelForInstanceSegmentation": Tiny(
        lambda: hf.MaskFormerConfig(
            backbone_config=_resnet(),
            decoder_config=_detr(),
            fpn_feature_size=32,
            mask_feature_size=32,
            num_labels=3,
        ),
        lambda d: regions(d, IMAGE),
        stacked,
        not_exact="divided by the number of objects",
    ),
    "AutoModelForKeypointDetection": Tiny(
        lambda: hf.SuperPointConfig(
            encoder_hidden_sizes=[4, 4, 4, 8], decoder_hidden_size=8, descriptor_decoder_dim=8
        ),
        lambda d: {**image(d), "labels": integers(d, 0, 2, 4)},
        stacked,
        refused=_NO_TRAINING,
    ),
    "AutoModelForKeypointMatching": Tiny(
        lambda: hf.SuperGlueConfig(
            keypoint_detector_config=hf.SuperPointConfig(
                encoder_hidden_sizes=[4, 4, 4, 8], decoder_hidden_size=8, descriptor_decoder_dim=8
            ),
            hidden_size=8,
            keypoint_encoder_sizes=[8],
            gnn_layers_types=["self"],
            num_attention_heads=2,
        ),
        lambda d: {"pixel_values": pixels(d, 2, 3, IMAGE, IMAGE), "labels": integers(d, 0, 2, 4)},
        stacked,
        refused=_NO_TRAINING,
    ),
    "AutoModelForMaskGeneration": Tiny(
        lambda: hf.SamConfig(
            vision_config=hf.SamVisionConfig(
                **_IMAGES, output_channels=8, window_size=2, global_attn_indexes=[0], num_pos_feats=4
            ),
            prompt_encoder_config=hf.SamPromptEncoderConfig(hidden_size=8, image_size=IMAGE, patch_size=16),
            mask_decoder_config=hf.SamMaskDecoderConfig(
                hidden_size=8, mlp_dim=8, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=8
            ),
        ),
        lambda d: {**image(d), "input_points": torch.rand(1, 1, 2, generator=d) * IMAGE},
        stacked,
        refused=_NO_LOSS,
    ),
    "AutoModelForMaskedImageModeling": Tiny(_vit(encoder_stride=16), _patches, stacked),
    "AutoModelForMaskedLM": Tiny(_bert(), masked, stacked),
    "AutoModelForMultimodalLM": Tiny(_llava, text_and_image, stacked),
    "AutoModelForMultipleChoice": Tiny(_bert(), _choices, stacked),
    "AutoModelForNextSentencePrediction": Tiny(
        _bert(), lambda d: {**tokens(d), "labels": integers(d, 0, 2)}, stacked
    ),
    "AutoModelForNormalEstimation": Tiny(
        _sapiens,
        lambda d: {**image(d), "labels": pixels(d)},
        stacked,
        refused=_NO_TRAINING,
    ),
    "AutoModelForObjectDetection": Tiny(
        lambda: hf.YolosConfig(
            **{**_IMAGES, "image_size": [IMAGE, IMAGE]}, num_detection_tokens=5, num_labels=3
        ),
        boxes,
        stacked,
        not_exact="divided by the number of objects",
    ),
    "AutoModelForPointmapEstimation": Tiny(
        _sapiens,
        lambda d: {**image(d), "labels": pixels(d)},
        stacked,
        refused=_NO_TRAINING,
    ),
    "AutoModelForPoseEstimation": Tiny(
        _sapiens,
        lambda d: {**image(d), "labels": pixels(d, 3, 4, 4)},
        stacked,
    ),
    "AutoModelForPreTraining": Tiny(
        _bert(), _pretraining, stacked, not_exact="the sum of a mean over words and one over rows"
    ),
    "AutoModelForQuestionAnswering": Tiny(_bert(), span, stacked),
    "AutoModelForRNNT": Tiny(
        lambda: hf.ParakeetRNNTConfig(encoder_config=_parakeet(), **_TRANSDUCER),
        _spoken,
        stacked,
        refused="" if is_torchaudio_available() else "rnnt_loss requires the torchaudio library",
    ),
    "AutoModelForSemanticSegmentation": Tiny(
        lambda: hf.SegformerConfig(
            **_PYRAMID,
            num_labels=3,
        ),
        _segmentation,
        stacked,
    ),
    "AutoModelForSeq2SeqLM": Tiny(
        lambda: hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            decoder_start_token_id=0,
        ),
        masked,
        stacked,
    ),
    "AutoModelForSequenceClassification": Tiny(
        _bert(num_labels=3), lambda d: {**tokens(d), "labels": integers(d, 0, 3)}, stacked
    ),
    "AutoModelForSpeechSeq2Seq": Tiny(_whisper, _speech, stacked),
    "AutoModelForTDT": Tiny(
        lambda: hf.ParakeetTDTConfig(encoder_config=_parakeet(), **_TRANSDUCER), _spoken, stacked
    ),
    "AutoModelForTableQuestionAnswering": Tiny(
        lambda: hf.TapasConfig(
            **_BERT, type_vocab_sizes=[3, 8, 8, 2, 8, 8, 2], max_num_rows=8, max_num_columns=8
        ),
        _table,
        stacked,
    ),
    "AutoModelForTableRecognition": Tiny(
        lambda: hf.SLANetConfig(hidden_size=8, out_channels=5, max_text_length=3, post_conv_out_channels=8),
        image,
        stacked,
        refused=_NO_LOSS,
    ),
    "AutoModelForTextEncoding": Tiny(_bert(), tokens, stacked, refused="has no loss"),
    "AutoModelForTextRecognition": Tiny(
        lambda: hf.PPOCRV5MobileRecConfig(hidden_size=8, depth=1, head_out_channels=5, num_attention_heads=2),
        lambda d: {"pixel_values": pixels(d, 3, 96, 96)},
        stacked,
        refused=_NO_LOSS,
    ),
    "AutoModelForTextToSpectrogram": Tiny(
        lambda: hf.SpeechT5Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_mel_bins=8,
            reduction_factor=2,
            speech_decoder_prenet_units=8,
            speech_decoder_postnet_units=8,
            speech_decoder_postnet_layers=2,
            speaker_embedding_dim=4,
            max_text_positions=16,
            max_speech_positions=32,
        ),
        lambda d: {
            **tokens(d),
            "labels": torch.randn(8, 8, generator=d),
            "decoder_attention_mask": torch.ones(8).long(),
            "speaker_embeddings": torch.randn(4, generator=d),
        },
        stacked,
        not_exact="dropout that is never off",
    ),
    "AutoModelForTextToWaveform": Tiny(
        lambda: hf.VitsConfig(
            **{**_LAYERS, "vocab_size": VOCABULARY, "flow_size": 16, "ffn_dim": 16, "spectrogram_bins": 9},
            upsample_initial_channel=16,
            prior_encoder_num_flows=1,
            prior_encoder_num_wavenet_layers=1,
            posterior_encoder_num_wavenet_layers=1,
            duration_predictor_num_flows=1,
        ),
        lambda d: {**tokens(d), "labels": torch.randn(9, 8, generator=d)},
        stacked,
        refused=_NO_TRAINING,
    ),
    "AutoModelForTimeSeriesPrediction": Tiny(
        lambda: hf.TimesFmConfig(
            **_LAYERS, patch_length=4, context_length=16, horizon_length=4, head_dim=8, pad_val=1e6
        ),
        lambda d: {
            "past_values": torch.randn(16, generator=d),
            "future_values": torch.randn(4, generator=d),
        },
        stacked,
    ),
    "AutoModelForTokenClassification": Tiny(
        _bert(num_labels=3),
        lambda d: {**tokens(d), "labels": holes(d, integers(d, 0, 3, LENGTH))},
        stacked,
    ),
    "AutoModelForUniversalSegmentation": Tiny(
        lambda: hf.Mask2FormerConfig(
            backbone_config=_resnet(),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=16,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            dim_feedforward=16,
            num_queries=5,
            train_num_points=16,
            num_labels=3,
        ),
        lambda d: regions(d, IMAGE),
        stacked,
        not_exact="divided by the number of objects",
    ),
    "AutoModelForVideoClassification": Tiny(
        lambda: hf.VideoMAEConfig(**_IMAGES, num_frames=2, tubelet_size=2, num_labels=3),
        lambda d: {"pixel_values": pixels(d, 2, 3, IMAGE, IMAGE), "labels": integers(d, 0, 3)},
        stacked,
    ),
    "AutoModelForVisualQuestionAnswering": Tiny(
        lambda: hf.ViltConfig(**_BERT, image_size=IMAGE, patch_size=16, num_labels=3),
        _question_about_image,
        stacked,
    ),
    "AutoModelForZeroShotImageClassification": Tiny(
        lambda: hf.CLIPConfig(text_config=_clip_text(), vision_config=dict(_IMAGES), projection_dim=8),
        _pair,
        with_loss,
        not_exact="rows are compared with each other",
    ),
    "AutoModelForZeroShotObjectDetection": Tiny(
        lambda: hf.OwlViTConfig(text_config=_clip_text(), vision_config=dict(_IMAGES), projection_dim=16),
        _pair,
        stacked,
        refused=_NO_LOSS,
    ),
}
