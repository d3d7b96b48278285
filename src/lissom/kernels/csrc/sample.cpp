#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "engine.h"

namespace lissom {

int sample(float *logits, int n, const Sampling &how, const int *seen, size_t seen_count, double uniform) {
    if (how.repetition_penalty != 1) { // CTRL's rule: once for each token that occurred
        std::vector<int> once(seen, seen + seen_count);
        std::sort(once.begin(), once.end());
        once.erase(std::unique(once.begin(), once.end()), once.end());
        for (int t : once)
            if (t >= 0 && t < n) logits[t] = logits[t] > 0 ? logits[t] / how.repetition_penalty : logits[t] * how.repetition_penalty;
    }
    const int best = (int)(std::max_element(logits, logits + n) - logits);
    if (how.temperature <= 0 || how.top_k == 1) return best;

    // Candidates: weights below 1e-9 of the best cannot matter to any of the rules
    const float top = logits[best], cut = how.min_p > 0 ? std::max(std::log(how.min_p), -20.7f) : -20.7f;
    std::vector<std::pair<float, int>> kept;
    for (int i = 0; i < n; i++) {
        const float z = (logits[i] - top) / how.temperature;
        if (z >= cut) kept.push_back({z, i});
    }
    const auto before = [](const auto &a, const auto &b) { return a.first != b.first ? a.first > b.first : a.second < b.second; };
    if (how.top_k > 0 && (size_t)how.top_k < kept.size()) {
        std::nth_element(kept.begin(), kept.begin() + how.top_k - 1, kept.end(), before);
        kept.resize(how.top_k);
    }
    std::sort(kept.begin(), kept.end(), before);
    double total = 0;
    for (auto &k : kept) total += std::exp((double)k.first);
    if (how.top_p < 1) { // the smallest set whose probability reaches top_p
        double mass = 0;
        size_t count = 0;
        while (count < kept.size() && mass < how.top_p * total) mass += std::exp((double)kept[count++].first);
        kept.resize(std::max<size_t>(count, 1));
        total = mass;
    }
    double left = uniform * total;
    for (auto &k : kept)
        if ((left -= std::exp((double)k.first)) < 0) return k.second;
    return kept.back().second;
}

} // namespace lissom
