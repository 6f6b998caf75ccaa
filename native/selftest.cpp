// SPDX-License-Identifier: Apache-2.0
// Every instruction set that this CPU has against sums in double, written from the formula. Built on demand, to run
// under sanitizers and under an emulator: prints what was checked, returns 1 at the first difference.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <string>
#include <vector>

#include "masquant.h"

namespace {

std::mt19937 random_engine(1);
float normal() { return std::normal_distribution<float>()(random_engine); }
int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_engine); }
uint16_t to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
float from_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

struct Shape {
    int inputs, group, bits, activation_bits, tokens, modalities, rank;
    bool rotated, bfloat16;
    std::vector<int> rows;
};

// Everything that a group points to.
struct Group {
    mq_group g{};
    std::vector<int> weights;  // [all rows, inputs], as integers
    std::vector<int32_t> rows;
    std::vector<uint8_t> packed;
    std::vector<uint16_t> scale, smooth, a, b;
    std::vector<float> bias, signs, matrix;
    std::vector<mq_patch> patches;
    int padded_out = 0;

    explicit Group(const Shape& s) : rows(s.rows.begin(), s.rows.end()) {
        const int K = s.inputs, padded = (K + 15) / 16 * 16, groups = s.group ? K / s.group : 1;
        std::vector<uint8_t> disk;
        for (int n : rows) {
            const int row_bytes = (K * s.bits + 31) / 32 * 4, low = -(1 << (s.bits - 1)), start = padded_out;
            disk.assign((size_t)n * row_bytes, 0);
            for (int r = 0; r < n; r++)
                for (int k = 0; k < K; k++) {
                    const int q = integer(low, -low - 1);
                    weights.push_back(q);
                    uint8_t& at = disk[(size_t)r * row_bytes + k * s.bits / 8];
                    at = (uint8_t)(at | (q - low) << (s.bits == 4 && k % 2 ? 4 : 0));
                }
            padded_out += (n + 15) / 16 * 16;
            packed.resize((size_t)padded_out * padded * s.bits / 8);
            mq_pack(s.bits, n, K, disk.data(), row_bytes, packed.data() + (size_t)start * padded * s.bits / 8);
            std::vector<uint8_t> back(disk.size());
            mq_unpack(s.bits, n, K, packed.data() + (size_t)start * padded * s.bits / 8, back.data(), row_bytes);
            if (back != disk) {
                printf("packing is not undone\n");
                exit(1);
            }
        }
        scale.resize((size_t)padded_out * groups);
        for (auto& v : scale) v = to_bf16(0.01f * normal());
        bias.resize(padded_out);
        for (auto& v : bias) v = normal();
        smooth.resize((size_t)s.modalities * K);
        for (auto& v : smooth) v = to_bf16(0.5f + fabsf(normal()));
        for (int k = 0; k < K; k++) smooth[k] = to_bf16(1);
        a.resize((size_t)s.rank * padded);
        for (int r = 0; r < s.rank; r++)
            for (int k = 0; k < K; k++) a[(size_t)r * padded + k] = to_bf16(normal());
        b.resize((size_t)s.rank * padded_out);
        for (auto& v : b) v = to_bf16(normal());
        patches.resize(s.modalities);
        if (s.rank) patches[s.modalities - 1] = {s.rank, 0, a.data(), b.data(), nullptr};
        int odd = K;
        while (odd % 2 == 0) odd /= 2;
        for (int k = 0; k < K; k++) signs.push_back(integer(0, 1) ? 1.0f : -1.0f);
        for (int i = 0; i < odd * odd; i++) matrix.push_back(odd > 1 ? normal() / sqrtf((float)odd) : 1.0f);
        g.in_features = K;
        g.padded_in = padded;
        g.bits = s.bits;
        g.group_size = s.group ? s.group : padded;
        g.activation_bits = s.activation_bits;
        g.members = (int)rows.size();
        g.modalities = s.modalities;
        g.max_rank = s.rank;
        g.member_rows = rows.data();
        g.weight = packed.data();
        g.scale = scale.data();
        g.bias = bias.data();
        g.smooth = smooth.data();
        g.patches = patches.data();
        if (s.rotated) g.rotation = {K, odd, signs.data(), matrix.data()};
    }
};

// Input of one token after rotation and smoothing, in double.
std::vector<double> prepared(const Group& group, const Shape& s, std::vector<double> x, int modality) {
    const int K = s.inputs;
    if (s.rotated) {
        const int odd = group.g.rotation.odd, p = K / odd;
        std::vector<double> y(K, 0);
        for (int i = 0; i < odd; i++)
            for (int t = 0; t < p; t++)
                for (int j = 0; j < odd; j++)
                    for (int u = 0; u < p; u++) {
                        const double h = (__builtin_popcount(t & u) % 2 ? -1.0 : 1.0) / sqrt((double)p);
                        y[j * p + u] += x[i * p + t] * group.signs[i * p + t] * group.matrix[i * odd + j] * h;
                    }
        x = y;
    }
    if (modality)
        for (int k = 0; k < K; k++) x[k] /= from_bf16(group.smooth[(size_t)modality * K + k]);
    return x;
}

bool check(const Shape& s) {
    Group group(s);
    const int K = s.inputs, M = s.tokens, terms = s.activation_bits == 16 ? 2 : 1;
    std::vector<float> x((size_t)M * K);
    std::vector<uint16_t> half;
    for (auto& v : x) {
        v = normal();
        if (s.bfloat16) v = from_bf16(to_bf16(v));
        half.push_back(to_bf16(v));
    }
    std::vector<uint8_t> modality(M);
    for (auto& m : modality) m = (uint8_t)integer(0, s.modalities - 1);
    const void* input = s.bfloat16 ? (const void*)half.data() : x.data();
    std::vector<int8_t> q((size_t)M * terms * K);
    std::vector<float> steps(M * terms);
    mq_quantize(&group.g, input, s.bfloat16, M, modality.data(), q.data(), steps.data());
    std::vector<std::vector<float>> y;
    std::vector<void*> pointers;
    for (int n : s.rows) y.emplace_back((size_t)M * n);
    for (auto& part : y) pointers.push_back(part.data());
    if (mq_group_forward(&group.g, input, s.bfloat16, M, modality.data(), pointers.data(), 0)) return false;

    const int groups = s.group ? K / s.group : 1, size = K / groups;
    for (int t = 0; t < M; t++) {
        const std::vector<double> v = prepared(group, s, {x.begin() + (size_t)t * K, x.begin() + (size_t)(t + 1) * K},
                                               modality[t]);
        double worst = 0, absmax = 0;
        for (double f : v) absmax = fmax(absmax, fabs(f));
        for (int k = 0; k < K; k++) {
            double represented = 0;
            for (int i = 0; i < terms; i++)
                represented += (double)q[((size_t)t * terms + i) * K + k] * steps[t * terms + i];
            worst = fmax(worst, fabs(represented - v[k]));
        }
        const double limit = (1 << (terms == 2 ? 14 : s.activation_bits - 1)) - 1;
        if (worst > 0.5001 * absmax / limit + 1e-5 * absmax) {
            printf("token %d: rounded by %g of %g\n", t, worst, absmax);
            return false;
        }
        const mq_patch& patch = group.patches[modality[t]];
        std::vector<double> u(patch.rank, 0);
        for (int r = 0; r < patch.rank; r++)
            for (int k = 0; k < K; k++) u[r] += v[k] * from_bf16(group.a[(size_t)r * group.g.padded_in + k]);
        for (size_t m = 0, row = 0, start = 0; m < s.rows.size(); start += (s.rows[m] + 15) / 16 * 16, m++)
            for (int n = 0; n < s.rows[m]; n++, row++) {
                const size_t at = start + n;
                double wanted = group.bias[at], size_of_sum = fabs(wanted);
                for (int i = 0; i < terms; i++)
                    for (int j = 0; j < groups; j++) {
                        long long total = 0;
                        for (int k = j * size; k < (j + 1) * size; k++)
                            total += (long long)q[((size_t)t * terms + i) * K + k] * group.weights[row * K + k];
                        const double part = (double)total * steps[t * terms + i] *
                                            from_bf16(group.scale[(at / 16 * groups + j) * 16 + at % 16]);
                        wanted += part;
                        size_of_sum += fabs(part);
                    }
                for (int r = 0; r < patch.rank; r++) {
                    const double part = u[r] * from_bf16(group.b[(size_t)r * group.padded_out + at]);
                    wanted += part;
                    size_of_sum += fabs(part);
                }
                const double found = y[m][(size_t)t * s.rows[m] + n];
                if (!(fabs(found - wanted) <= 2e-5 * size_of_sum + 1e-5)) {
                    printf("token %d, output %d of member %d: %g, not %g\n", t, n, (int)m, found, wanted);
                    return false;
                }
            }
    }
    return true;
}

}  // namespace

int main() {
    std::string names = mq_instruction_sets(1);
    int checked = 0;
    for (size_t from = 0; from < names.size();) {
        const size_t to = std::min(names.find(',', from), names.size());
        const std::string name = names.substr(from, to - from);
        from = to + 1;
        mq_select(name.c_str());
        for (int bits : {4, 8})
            for (int activation_bits : {6, 8, 16})
                for (int tokens : {1, 2, 3, 5, 17, 100})
                    for (const auto& inputs : {std::pair<int, int>{64, 32}, {192, 64}, {96, 0}, {17, 0}, {8, 0}}) {
                        const bool odd = tokens % 2;
                        Shape s{inputs.first, inputs.second, bits, activation_bits, tokens, 3, odd ? 5 : 0,
                                inputs.first != 17 && !odd, odd, {33, 16, 1}};
                        checked++;
                        if (!check(s)) {
                            printf("%s: %d inputs, groups of %d, %d bits, activations of %d, %d tokens\n",
                                   name.c_str(), s.inputs, s.group, bits, activation_bits, tokens);
                            return 1;
                        }
                    }
        printf("%s\n", name.c_str());
    }
    printf("%d products agree\n", checked);
    return 0;
}
