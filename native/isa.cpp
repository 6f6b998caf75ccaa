// SPDX-License-Identifier: Apache-2.0
// The kernels for one instruction set: compiled once each, with MQ_NAME and one of MQ_AVX512VNNI, ... defined.
#include "decoder.h"
#include "isa.h"

extern const Kernels MQ_NAME;
const Kernels MQ_NAME = {group_bytes, group_forward, group_quantize, decoder_bytes, decoder_forward, read_bytes,
                         peak_operations, &patched_tokens};
