# command:  torchrun --nproc_per_node=8 tools/train_segmentor.py \
#               configs/segmentation/vrwkv_adapter_large_upernet_ade20k_512_160k.py
# hardware: 8 GPUs
# time:     not run
# result:   not run
#
# Starts from the authors' vrwkv_l_in22k_192.pth (huggingface.co/OpenGVLab/Vision-RWKV), which is to lie in pretrained/.
# The authors trained in fp16 with a loss scale from 512 (--amp here).
# Position embedding of 12 x 12 patches and key norms, as in the file it starts from.
_base_ = "./_base_upernet_ade20k_512_160k.py"

model = dict(
    backbone=dict(
        type="VRWKVAdapter",
        model="vrwkv_large_patch16_192",
        model_args=dict(drop_path_rate=0.4, init_values=1e-5),
        conv_inplane=64,
        n_points=4,
        deform_num_heads=16,
        deform_ratio=0.5,
        cffn_ratio=0.25,
        interaction_indexes=[[0, 5], [6, 11], [12, 17], [18, 23]],
        init_cfg=dict(type="Pretrained", checkpoint="pretrained/vrwkv_l_in22k_192.pth"),
    ),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(decay_rate=0.9))
