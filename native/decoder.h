// SPDX-License-Identifier: Apache-2.0
// A whole decoder over low-bit linears: RMSNorm, rotary attention with a cache, gated SiLU MLP. One parallel region a
// call, a handful of barriers a block.
#include "kernels.h"

namespace {

constexpr int QUERIES = 4;  // of one attention task

struct DecoderMemory {
    float *q, *k, *v, *attention, *gate, *up;  // [tokens, ...]
    Prepared prepared;
};

// A group as large as the largest of the decoder's, for its scratch memory.
mq_group largest_group(const mq_decoder& d) {
    mq_group all = d.layer[0].qkv;
    int groups = 1;
    for (int i = 0; i < d.layers; i++)
        for (int j = 0; j < 4; j++) {
            const mq_layer& layer = d.layer[i];
            const mq_group* g = j == 0 ? &layer.qkv : j == 1 ? &layer.o : j == 2 ? &layer.gate_up : &layer.down;
            if (g->padded_in > all.padded_in) all.padded_in = g->padded_in;
            if (g->activation_bits > all.activation_bits) all.activation_bits = g->activation_bits;
            if (g->max_rank > all.max_rank) all.max_rank = g->max_rank;
            if (groups_of(*g) > groups) groups = groups_of(*g);
        }
    all.group_size = all.padded_in / groups;  // at least as many scales as any
    if (all.group_size < 1) all.group_size = 1;
    return all;
}

DecoderMemory take_memory(Arena& a, const mq_decoder& d, const mq_group& largest, int64_t tokens) {
    DecoderMemory m;
    m.q = a.take<float>(tokens * d.heads * d.head_dim);
    m.k = a.take<float>(tokens * d.kv_heads * d.head_dim);
    m.v = a.take<float>(tokens * d.kv_heads * d.head_dim);
    m.attention = a.take<float>(tokens * d.heads * d.head_dim);
    m.gate = a.take<float>(tokens * d.intermediate);
    m.up = a.take<float>(tokens * d.intermediate);
    m.prepared = take_prepared(a, largest, tokens);
    return m;
}

int64_t decoder_bytes(const mq_decoder* d, int64_t tokens, int64_t past, int threads) {
    Arena a{nullptr};
    const mq_group largest = largest_group(*d);
    take_memory(a, *d, largest, tokens);
    for (int i = 0; i < threads; i++) take_private(a, largest, QUERIES * (past + tokens + B));
    return (int64_t)(a.at - (char*)nullptr);
}

// out = x / rms(x) * weight, n values.
void normalize(const float* x, const float* weight, float eps, int n, float* out) {
    vf s = {};
    float rest = 0;
    int k = 0;
    for (; k + L <= n; k += L) s += load<vf>(x + k) * load<vf>(x + k);
    for (; k < n; k++) rest += x[k] * x[k];
    const float r = 1.0f / sqrtf((sum(s) + rest) / n + eps);
    for (k = 0; k + L <= n; k += L) store(out + k, load<vf>(x + k) * r * load<vf>(weight + k));
    for (; k < n; k++) out[k] = x[k] * r * weight[k];
}

// Rotary embedding of one head, halves paired.
void embed_position(float* x, const float* cosine, const float* sine, int n) {
    for (int i = 0; i < n / 2; i++) {
        const float a = x[i], b = x[i + n / 2];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + n / 2] = b * cosine[i + n / 2] + a * sine[i + n / 2];
    }
}

template <int N>
struct Count {
    static constexpr int value = N;
};

// NQ consecutive tokens of one head against all keys up to their own.
template <int NQ>
void attend(const mq_decoder& d, const mq_layer& layer, const DecoderMemory& m, int head, int64_t token, int64_t past,
            float* scores) {
    const int D = d.head_dim, kv = head / (d.heads / d.kv_heads);
    const int64_t keys = past + token + NQ, width = ceil_div(keys, B) * B;
    const float* q = m.q + (token * d.heads + head) * D;
    const int64_t stride = (int64_t)d.heads * D;
    const float* kc = layer.key_cache + (int64_t)kv * d.capacity * D;
    for (int64_t at = 0; at < keys; at += B, kc += (int64_t)D * B) {
        vf s[NQ][P] = {};
        for (int i = 0; i < D; i++)
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                vf key = load<vf>(kc + i * B + p * L);
#pragma GCC unroll 4
                for (int n = 0; n < NQ; n++) s[n][p] += q[n * stride + i] * key;
            }
        for (int n = 0; n < NQ; n++)
            for (int p = 0; p < P; p++) store(scores + n * width + at + p * L, s[n][p] * d.attention_scale);
    }
    float inverse[NQ];
    for (int n = 0; n < NQ; n++) {
        float* s = scores + n * width;
        const int64_t valid = past + token + n + 1;
        for (int64_t i = valid; i < width; i++) s[i] = -INFINITY;
        vf top = set1(-INFINITY);
        for (int64_t i = 0; i < width; i += L) top = maximum(load<vf>(s + i), top);
        const float peak = largest(top);
        vf total = {};
        for (int64_t i = 0; i < width; i += L) {
            vf e = exponential(load<vf>(s + i) - peak);
            total += e;
            store(s + i, e);
        }
        for (int64_t i = valid; i < width; i++) s[i] = 0;
        inverse[n] = 1.0f / sum(total);
    }
    const float* vc = layer.value_cache + (int64_t)kv * d.capacity * D;
    float* out = m.attention + (token * d.heads + head) * D;
    auto columns = [&](auto count, int from) {  // `count` vectors of the result, in registers
        constexpr int C = decltype(count)::value;
        vf a[NQ][C] = {};
        for (int64_t t = 0; t < keys; t++) {
            vf v[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) v[c] = load<vf>(vc + t * D + from + c * L);
#pragma GCC unroll 4
            for (int n = 0; n < NQ; n++)
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) a[n][c] += scores[n * width + t] * v[c];
        }
        for (int n = 0; n < NQ; n++)
            for (int c = 0; c < C; c++) store(out + n * stride + from + c * L, a[n][c] * inverse[n]);
    };
    constexpr int several = LANES == 16 ? 4 : 2;
    int i = 0;
    for (; i + several * L <= D; i += several * L) columns(Count<several>{}, i);
    for (; i < D; i += L) columns(Count<1>{}, i);
}

void decode_block(const mq_decoder& d, const mq_layer& layer, const DecoderMemory& m, const Private& mine,
                  int64_t tokens, int64_t past, float* hidden, const uint8_t* rows, const float* cosine,
                  const float* sine) {
    const int D = d.head_dim, H = d.hidden;
    auto norm_of = [&](const mq_group& g, const float* weight) {
        return [&, weight](int64_t t, float* v) {
            normalize(hidden + t * H, weight, d.eps, H, v);
            for (int k = H; k < g.padded_in; k++) v[k] = 0;
        };
    };
    Prepared in = prepare(layer.qkv, mine, m.prepared, tokens, rows, norm_of(layer.qkv, layer.input_norm));
    void* const qkv[] = {m.q, m.k, m.v};
    multiply(layer.qkv, mine, in, tokens, rows, Output{qkv, false, false});

    const int each = d.heads + d.kv_heads;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tokens * each; task++) {
        const int64_t t = task / each, at = past + t;
        const int head = task % each;
        const float *c = cosine + t * d.rotary_dim, *s = sine + t * d.rotary_dim;
        if (head < d.heads) {
            float* q = m.q + (t * d.heads + head) * D;
            if (layer.q_norm) normalize(q, layer.q_norm, d.eps, D, q);
            embed_position(q, c, s, d.rotary_dim);
            continue;
        }
        const int kv = head - d.heads;
        float* k = m.k + (t * d.kv_heads + kv) * D;
        if (layer.k_norm) normalize(k, layer.k_norm, d.eps, D, k);
        embed_position(k, c, s, d.rotary_dim);
        float* to = layer.key_cache + (int64_t)kv * d.capacity * D + at / B * D * B + at % B;
        for (int i = 0; i < D; i++) to[i * B] = k[i];
        memcpy(layer.value_cache + ((int64_t)kv * d.capacity + at) * D, m.v + (t * d.kv_heads + kv) * D,
               sizeof(float) * D);
    }

    const int64_t chunks = ceil_div(tokens, QUERIES);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < chunks * d.heads; task++) {
        const int64_t first = (chunks - 1 - task / d.heads) * QUERIES;  // the longest first
        const int head = task % d.heads;
        if (first + QUERIES <= tokens) {
            attend<QUERIES>(d, layer, m, head, first, past, mine.scores);
        } else {
            for (int64_t t = first; t < tokens; t++) attend<1>(d, layer, m, head, t, past, mine.scores);
        }
    }

    in = prepare(layer.o, mine, m.prepared, tokens, rows,
                 [&](int64_t t, float* v) { fill_row(layer.o, m.attention, false, t, v); });
    void* const to_hidden[] = {hidden};
    multiply(layer.o, mine, in, tokens, rows, Output{to_hidden, false, true});

    in = prepare(layer.gate_up, mine, m.prepared, tokens, rows, norm_of(layer.gate_up, layer.post_norm));
    void* const gate_up[] = {m.gate, m.up};
    multiply(layer.gate_up, mine, in, tokens, rows, Output{gate_up, false, false});

    in = prepare(layer.down, mine, m.prepared, tokens, rows, [&](int64_t t, float* v) {
        const float *gate = m.gate + t * d.intermediate, *up = m.up + t * d.intermediate;
        int k = 0;
        for (; k + L <= d.intermediate; k += L) {
            vf x = load<vf>(gate + k);
            store(v + k, x / (exponential(-x) + 1.0f) * load<vf>(up + k));
        }
        for (; k < d.intermediate; k++) v[k] = gate[k] / (expf(-gate[k]) + 1.0f) * up[k];
        for (; k < layer.down.padded_in; k++) v[k] = 0;
    });
    multiply(layer.down, mine, in, tokens, rows, Output{to_hidden, false, true});
}

void decoder_forward(const mq_decoder* d, int64_t tokens, int64_t past, float* hidden, const uint8_t* rows,
                     const float* cosine, const float* sine, int64_t normed, char* memory, int threads) {
    const mq_group largest = largest_group(*d);
    Arena arena{memory};
    const DecoderMemory m = take_memory(arena, *d, largest, tokens);
    Arena probe{nullptr};
    take_private(probe, largest, QUERIES * (past + tokens + B));
    const int64_t each = probe.at - (char*)nullptr;
#pragma omp parallel num_threads(threads)
    {
        Arena own{arena.at + omp_get_thread_num() * each};
        const Private mine = take_private(own, largest, QUERIES * (past + tokens + B));
        if (d->residual.size) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tokens; t++) rotate(d->residual, hidden + t * d->hidden, mine.other, false);
        }
        for (int i = 0; i < d->layers; i++)
            decode_block(*d, d->layer[i], m, mine, tokens, past, hidden, rows, cosine, sine);
#pragma omp for schedule(static)
        for (int64_t t = tokens - normed; t < tokens; t++) {
            float* h = hidden + t * d->hidden;
            if (d->residual.size) rotate(d->residual, h, mine.other, true);
            normalize(h, d->final_norm, d->eps, d->hidden, h);
        }
    }
}

}  // namespace
